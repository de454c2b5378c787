"""Parity at published sizes: keys, exact numbers of parameters, and outputs for weights computed from their names.

Models above 200 million parameters are built without memory and compared by keys and counts; ZOO_TEST_FULLSIZE=1 runs
them too.
"""

from pathlib import Path

import pytest

import zoo.testing

CARDS = sorted(Path(__file__).parent.glob("*.json"))


def test_there_are_cards():
    assert CARDS


@pytest.mark.slow
@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_fullsize(path):
    zoo.testing.check_fullsize(path)
