"""zoo_audio: speech to text with carried states, and raw audio one sample at a time."""

__version__ = "0.1.0"
