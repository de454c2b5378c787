"""Parity at published sizes: keys, exact numbers of parameters, and outputs for weights computed from their names.

The cards are gzipped: lists of keys and shapes take a tenth.

Models above 200 million parameters are built without memory and compared by keys and counts; ZOO_TEST_FULLSIZE=1 runs
them too.
"""

from pathlib import Path

import pytest

import zoo.testing

CARDS = sorted(Path(__file__).parent.glob("*.json.gz"))
#: Cards that are another form of the model they name.
FORMS = {
    "vmamba__vmamba_tiny_s1l8_backbone": {"features_only": True},
    "umamba__enc_3d_16x96x96": {"input_size": (16, 96, 96)},
}


def test_there_are_cards():
    assert CARDS


@pytest.mark.slow
@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.name.removesuffix(".json.gz"))
def test_fullsize(path):
    zoo.testing.check_fullsize(path, arguments=FORMS.get(path.name.removesuffix(".json.gz")))
