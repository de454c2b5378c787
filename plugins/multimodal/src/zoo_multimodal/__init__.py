"""zoo_multimodal: multimodal models of the zoo of state-space models: mmMamba, Mixture-of-Mamba, Broad Mamba."""

__version__ = "0.1.0"
