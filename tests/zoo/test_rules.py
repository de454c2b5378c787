"""Key tables run both ways."""

import pytest
import torch

from zoo.rules import (
    Apply,
    Concat,
    Drop,
    Permute,
    Rename,
    Reshape,
    Rules,
    Scale,
    Split,
    Squeeze,
    Stack,
    Tied,
    Transpose,
    Unsqueeze,
    Unstack,
)


def filled(**shapes):
    return {k.replace("__", "."): torch.randn(s) for k, s in shapes.items()}


def round_trip(rules, state):
    ours = rules.to_zoo(state)
    back = rules.to_reference(ours)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
    return ours


def test_rename_with_fields():
    rules = Rules(Rename("layers.{i:d}.mixer.{rest:*}", "blocks.{i}.{rest}"))
    ours = round_trip(rules, filled(layers__3__mixer__norm__weight=(2,), layers__x__mixer__a=(1,), other=(1,)))
    assert set(ours) == {"blocks.3.norm.weight", "layers.x.mixer.a", "other"}


def test_the_first_rule_that_matches_wins():
    rules = Rules(Rename("a.{x}", "first.{x}"), Rename("a.b", "second"))
    assert set(rules.to_zoo(filled(a__b=(1,)))) == {"first.b"}


@pytest.mark.parametrize(
    "op",
    [
        Transpose(0, 1),
        Permute((2, 0, 1)),
        Reshape(zoo=(-1,), reference=(2, 3, 1)),
        Reshape(zoo=lambda s: (s[0], -1), reference=lambda s: (s[0], 3, 1)),
        Squeeze(2),
        Unsqueeze(0),
        Scale(2.0),
        Apply(torch.neg, torch.neg),
    ],
    ids=lambda op: type(op).__name__,
)
def test_operations(op):
    round_trip(Rules(Rename("w", "v", op)), filled(w=(2, 3, 1)))


def test_operations_run_backwards_in_the_other_order():
    ours = round_trip(Rules(Rename("w", "v", Transpose(0, 1), Unsqueeze(0))), filled(w=(2, 3)))
    assert ours["v"].shape == (1, 3, 2)


def test_permute_is_what_it_says():
    assert Permute((2, 0, 1)).to_zoo(torch.zeros(2, 3, 4)).shape == (4, 2, 3)


def test_groups():
    rules = Rules(
        Stack(["l.{i}.A", "l.{i}.A_b"], "b.{i}.A"),
        Stack("x.{k}.weight", "x", Transpose(0, 1), over="k", count=3, axis=1),
        Unstack("u", ["u0", "u1"]),
        Concat(["q", "k", "v"], "qkv", sizes=[4, -1, 2]),
        Concat(["c0", "c1"], "c", axis=1),
        Split("in.{i}", ["x.{i}", "z.{i}"]),
        Split("cut", ["cut0", "cut1"], sizes=[1, 2]),
    )
    state = filled(l__0__A=(3,), l__0__A_b=(3,), u=(2, 5), q=(4, 2), k=(3, 2), v=(2, 2), in__7=(6,), cut=(3,))
    state |= filled(x__0__weight=(2, 3), x__1__weight=(2, 3), x__2__weight=(2, 3), c0=(2, 2), c1=(2, 2))
    ours = round_trip(rules, state)
    assert {k: tuple(v.shape) for k, v in ours.items()} == {
        "b.0.A": (2, 3),
        "u0": (5,),
        "u1": (5,),
        "qkv": (9, 2),
        "x.7": (3,),
        "z.7": (3,),
        "cut0": (1,),
        "cut1": (2,),
        "x": (3, 3, 2),
        "c": (2, 4),
    }


def test_tied():
    rules = Rules(Tied("emb", "head"), Rename("emb", "embedding"))
    weight = torch.randn(3)
    ours = round_trip(rules, {"emb": weight, "head": weight.clone()})
    assert set(ours) == {"embedding"}
    with pytest.raises(ValueError, match="differs"):
        rules.to_zoo({"emb": weight, "head": weight + 1})
    with pytest.raises(ValueError, match="not in the state dict"):
        rules.to_zoo({"head": weight})


def test_drop_and_restore():
    rules = Rules(
        Drop(
            "{rest:*}.batches", once="{rest:*}.mean", restore=lambda state, fields: torch.zeros((), dtype=torch.int64)
        ),
        Drop("mask"),
    )
    state = filled(bn__mean=(2,)) | {"bn.batches": torch.zeros((), dtype=torch.int64), "mask": torch.ones(3)}
    ours = rules.to_zoo(state)
    assert set(ours) == {"bn.mean"}
    assert set(rules.to_reference(ours)) == {"bn.mean", "bn.batches"}


def test_nested():
    inner = Rules(Tied("a", "copy"), Rename("a", "alpha"), Stack(["s0", "s1"], "s"), Drop("gone"))
    rules = inner.nested("encoder.", "backbone.") + Rules(Rename("head", "classifier"))
    a = torch.randn(2)
    state = {"encoder.a": a, "encoder.copy": a.clone(), "encoder.s0": a, "encoder.s1": a, "encoder.other": a, "head": a}
    ours = round_trip(rules, state)
    assert set(ours) == {"backbone.alpha", "backbone.s", "backbone.other", "classifier"}


def test_messages():
    with pytest.raises(ValueError, match=r"not \['second'\]"):
        Rules(Stack(["first", "second"], "both")).to_zoo(filled(first=(1,)))
    with pytest.raises(ValueError, match=r"do not fit their key rule: first \(1,\), second \(2,\)\."):
        Rules(Stack(["first", "second"], "both")).to_zoo(filled(first=(1,), second=(2,)))
    with pytest.raises(ValueError, match="same on each side"):
        Rename("a.{i}", "b")
    with pytest.raises(ValueError, match="at most one of them -1"):
        Concat(["a", "b"], "c", sizes=[-1, -1])
    with pytest.raises(ValueError, match="does not divide"):
        Rules(Split("a", ["b", "c"])).to_zoo(filled(a=(3,)))
    with pytest.raises(ValueError, match="cannot be cut"):
        Rules(Split("a", ["b", "c"], sizes=[3, 3])).to_zoo(filled(a=(3,)))
    with pytest.raises(ValueError, match="two rules write"):
        Rules(Rename("a", "c"), Rename("b", "c")).to_zoo(filled(a=(1,), b=(1,)))
    with pytest.raises(ValueError, match="not of size 1"):
        Rules(Rename("a", "b", Squeeze(0))).to_zoo(filled(a=(2,)))
    with pytest.raises(ValueError, match="together, or neither"):
        Drop("a", once="b")
    with pytest.raises(ValueError, match="over="):
        Stack("a.{k}", "a", over="k")
    with pytest.raises(ValueError, match="has 3 entries"):
        Rules(Unstack("a", ["b", "c"])).to_zoo(filled(a=(3,)))
