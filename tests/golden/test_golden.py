"""Parity: every recorded tensor of every original, recomputed with our code from the original's own weights."""

from pathlib import Path

import pytest

import zoo.testing

FILES = sorted(Path(__file__).parent.glob("*.safetensors"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    zoo.testing.check_golden(path)
