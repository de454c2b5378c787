"""Encoder-attender-decoder networks of touch: whisker forces and torques to the category of the touched object."""
