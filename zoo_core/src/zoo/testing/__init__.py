"""The test kit: what any plugin, ours or a third party's, runs in a few lines.

Every registered model of a plugin::

    import pytest, zoo.testing

    @pytest.mark.parametrize("name", zoo.testing.model_names(plugin="vision"))
    class TestModels(zoo.testing.ModelTests):
        pass

Parity with the originals, from recorded tensors and from computed weights::

    zoo.testing.check_golden("tests/golden/vim__midclstok_v2.safetensors")
    zoo.testing.check_fullsize("tests/fullsize/vim__vim_tiny.json")

Each check is also a function (``check_forward``, ``check_backward`` ...) that takes a :class:`Case` or a model name and
raises AssertionError with a sentence saying what differs and by how much.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Case": "cases",
    "case": "cases",
    "draw": "cases",
    "model_names": "cases",
    "ModelTests": "suite",
    "check_golden": "golden",
    "check_fullsize": "fullsize",
    "procedural_inputs": "procedural",
    "procedural_state": "procedural",
    "procedural_values": "procedural",
    "assert_close": "compare",
    "relative_error": "compare",
    "check_adapt": "contract",
    "check_autocast": "training",
    "check_backward": "contract",
    "check_bfloat16": "contract",
    "check_card": "contract",
    "check_compile": "contract",
    "check_device": "contract",
    "check_exact_keys": "contract",
    "check_export": "contract",
    "check_features": "contract",
    "check_forward": "contract",
    "check_grad_checkpointing": "training",
    "check_odd_sizes": "contract",
    "check_padding": "contract",
    "check_parameters": "contract",
    "check_reset_head": "contract",
    "check_resume": "resuming",
    "check_rows": "contract",
    "check_save_load": "contract",
    "check_step": "contract",
}

if TYPE_CHECKING:
    from .cases import Case, case, draw, model_names
    from .compare import assert_close, relative_error
    from .contract import (
        check_adapt,
        check_backward,
        check_bfloat16,
        check_card,
        check_compile,
        check_device,
        check_exact_keys,
        check_export,
        check_features,
        check_forward,
        check_odd_sizes,
        check_padding,
        check_parameters,
        check_reset_head,
        check_rows,
        check_save_load,
        check_step,
    )
    from .fullsize import check_fullsize
    from .golden import check_golden
    from .procedural import procedural_inputs, procedural_state, procedural_values
    from .resuming import check_resume
    from .suite import ModelTests
    from .training import check_autocast, check_grad_checkpointing

__all__ = [
    "Case",
    "ModelTests",
    "assert_close",
    "case",
    "check_adapt",
    "check_autocast",
    "check_backward",
    "check_bfloat16",
    "check_card",
    "check_compile",
    "check_device",
    "check_exact_keys",
    "check_export",
    "check_features",
    "check_forward",
    "check_fullsize",
    "check_golden",
    "check_grad_checkpointing",
    "check_odd_sizes",
    "check_padding",
    "check_parameters",
    "check_reset_head",
    "check_resume",
    "check_rows",
    "check_save_load",
    "check_step",
    "draw",
    "model_names",
    "procedural_inputs",
    "procedural_state",
    "procedural_values",
    "relative_error",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
