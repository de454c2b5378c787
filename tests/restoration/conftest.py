"""Models and files that several tests take."""

import numpy as np
import pytest
import torch

import zoo
from zoo_restoration.drawings import drawing
from zoo_restoration.images import from_pixels, write_picture


@pytest.fixture
def restorer():
    torch.manual_seed(0)
    return zoo.create("serpent_micro", dims=[4, 6], state=2).eval()


@pytest.fixture
def enlarger():
    torch.manual_seed(0)
    return zoo.create("contrast_micro", dim=8, groups=1, state=2, window=4).eval()


@pytest.fixture
def folder(tmp_path):
    """Six small clean images."""
    for i in range(6):
        write_picture(from_pixels(np.ascontiguousarray(drawing(i, 40)[:36])), tmp_path / "clean" / f"{i}.png")
    return tmp_path / "clean"
