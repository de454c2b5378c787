"""zoo_medical: segmentation of medical images in 2D and 3D, and its pre-training. Not for clinical use."""

__version__ = "0.1.0"
