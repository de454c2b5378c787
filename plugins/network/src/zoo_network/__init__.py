"""zoo_network: network traffic models of the zoo of state-space models: NetMamba."""

__version__ = "0.1.0"
