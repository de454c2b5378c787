"""The messages that errors make themselves."""

from __future__ import annotations

import pytest

from zoo_registry import errors
from zoo_registry.errors import KeysDoNotMatch


def test_keys_do_not_match_says_everything():
    missing = tuple(f"layers.{i}.w" for i in range(7))
    with pytest.raises(KeysDoNotMatch) as caught:
        raise KeysDoNotMatch.between(
            "x.pth for vim_tiny",
            missing=missing,
            unexpected=["other.w"],
            mismatched={"head.weight": ((1000, 192), (10, 192))},
            explained={"head.bias": "num_classes=10"},
        )
    error = caught.value
    text = str(error)
    for word in [
        "7 missing, 1 unexpected, 1 of another shape",
        "x.pth for vim_tiny",
        "nothing was changed in the model",
        "layers.4.w ... and 2 more",
        "head.weight: (1000, 192) in the file, (10, 192) in the model",
        "head.bias (num_classes=10)",
    ]:
        assert word in text, text
    assert "layers.5.w" not in text
    assert error.missing == missing
    assert error.mismatched == {"head.weight": ((1000, 192), (10, 192))}


@pytest.mark.parametrize(
    ("missing", "unexpected", "mismatched", "cause"),
    [
        (["a.w", "b.w"], ["module.a.w", "module.b.w"], {}, "DataParallel"),
        (["a.w"], ["_orig_mod.a.w"], {}, "torch.compile"),
        (["backbone.a.w"], ["a.w"], {}, "add the prefix"),
        (["a"], ["model", "optimizer", "epoch"], {}, "training checkpoint"),
        ([], [], {"head.weight": ((10, 4), (5, 4))}, "num_classes="),
        ([], [], {"blocks.0.w": ((10, 4), (5, 4))}, "another size"),
        (["a", "b"], [], {}, "a part of the model"),
        ([f"a{i}" for i in range(20)], ["x"], {}, "another model"),
        (["a"], ["b"], {}, None),
    ],
)
def test_likely_causes(missing, unexpected, mismatched, cause):
    found = errors.likely_cause(missing, unexpected, mismatched)
    assert (cause in found) if cause else found is None


def test_the_base_classes():
    assert str(errors.ZooError()) == ""
    assert issubclass(errors.RenamedModelWarning, FutureWarning)
    assert errors.DiskFull("x").errno == 28
