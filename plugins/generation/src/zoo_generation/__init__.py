"""zoo_generation: generation models of the zoo of state-space models: DiMSUM and UniAnimate."""

__version__ = "0.1.0"
