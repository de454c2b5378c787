"""EEGDM: representations of EEG by a generative diffusion model, and what classifies them."""
