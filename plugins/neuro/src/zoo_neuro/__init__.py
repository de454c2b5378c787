"""zoo_neuro: neuroscience models of the zoo of state-space models: EEGDM, tactile encoder-attender-decoders."""

__version__ = "0.1.0"
