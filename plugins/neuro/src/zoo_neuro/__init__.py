"""zoo_neuro: neuroscience models of the zoo of state-space models: EEGDM and encoder-attender-decoder networks of touch."""

__version__ = "0.1.0"
