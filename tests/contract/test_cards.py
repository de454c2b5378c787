"""The contract over every registered model, in its tiny form."""

import pytest

import zoo.testing

NAMES = zoo.testing.model_names()


def test_there_are_models():
    assert NAMES, "no plugin is installed, so nothing was tested"


@pytest.mark.parametrize("name", NAMES)
class TestModels(zoo.testing.ModelTests):
    pass
