"""zoo_biology: models of DNA, proteins and small molecules: Bio-xLSTM."""

__version__ = "0.1.0"
