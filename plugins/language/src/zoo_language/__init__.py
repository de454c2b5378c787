"""zoo_language: language models whose context is a value of fixed size."""

__version__ = "0.1.0"
