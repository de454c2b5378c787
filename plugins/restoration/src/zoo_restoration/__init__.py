"""zoo_restoration: image restoration models of the zoo of state-space models: Serpent and Contrast."""

__version__ = "0.1.0"
