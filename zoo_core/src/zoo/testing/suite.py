"""The whole contract as one class: parametrise a subclass over names and every model of a plugin is tested."""

from __future__ import annotations

from collections.abc import Callable

from . import contract, training
from .cases import case


class ModelTests:
    """Every check of :mod:`zoo.testing.contract` and :mod:`zoo.testing.training`, as a test that takes ``name``.

    ::

        @pytest.mark.parametrize("name", zoo.testing.model_names(plugin="mine"))
        class TestModels(zoo.testing.ModelTests):
            pass

    A check that does not apply to a model (no ``step``, no classifier, no number of parameters on the card) is skipped
    by name, never passed silently.
    """

    def test_card(self, name: str) -> None:
        _apply(contract.check_card, name)

    def test_parameters(self, name: str) -> None:
        _apply(contract.check_parameters, name)

    def test_forward(self, name: str) -> None:
        _apply(contract.check_forward, name)

    def test_backward(self, name: str) -> None:
        _apply(contract.check_backward, name)

    def test_rows(self, name: str) -> None:
        _apply(contract.check_rows, name)

    def test_save_load(self, name: str) -> None:
        _apply(contract.check_save_load, name)

    def test_exact_keys(self, name: str) -> None:
        _apply(contract.check_exact_keys, name)

    def test_features(self, name: str) -> None:
        _apply(contract.check_features, name)

    def test_reset_head(self, name: str) -> None:
        _apply(contract.check_reset_head, name)

    def test_adapt(self, name: str) -> None:
        _apply(contract.check_adapt, name)

    def test_odd_sizes(self, name: str) -> None:
        _apply(contract.check_odd_sizes, name)

    def test_step(self, name: str) -> None:
        _apply(contract.check_step, name)

    def test_padding(self, name: str) -> None:
        _apply(contract.check_padding, name)

    def test_bfloat16(self, name: str) -> None:
        _apply(contract.check_bfloat16, name)

    def test_autocast(self, name: str) -> None:
        _apply(training.check_autocast, name)

    def test_grad_checkpointing(self, name: str) -> None:
        _apply(training.check_grad_checkpointing, name)

    def test_device(self, name: str) -> None:
        _apply(contract.check_device, name)

    def test_compile(self, name: str) -> None:
        _apply(contract.check_compile, name)

    def test_export(self, name: str) -> None:
        _apply(contract.check_export, name)


#: (check, what it ran on) -> its answer, for models that share a tiny form: the same computation runs once a process.
_done: dict[tuple[str, str], bool] = {}


def _apply(check: Callable[[str], bool], name: str) -> None:
    c = case(name)
    key = (check.__name__, repr((c.card.builder, c.config, c.specification)))
    by_card = check in (contract.check_card, contract.check_parameters)
    if by_card or key not in _done:
        _done[key] = check(name)
    if not _done[key]:
        import pytest

        pytest.skip(f"{check.__name__} does not apply to {name}")
