"""Parity: every recorded tensor of every original, recomputed with our code from the original's own weights."""

from pathlib import Path

import pytest
import torch

import zoo.testing

FILES = sorted(Path(__file__).parent.glob("*.safetensors*"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.split(".")[0])
def test_golden_on_a_gpu(path, monkeypatch):
    """The same numbers on a GPU, by its kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default rounds convolutions to 10 bits
    zoo.testing.check_golden(path, device="cuda")
