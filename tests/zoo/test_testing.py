"""The test kit itself: a good model passes, and each check fails for the fault that it is there for."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
import zoo.testing
from zoo.reference import read_golden
from zoo.testing import Case, contract
from zoo.testing.fullsize import _compare

#: What the rule gives, computed with the program that the full-size cards were made with.
RECORDED = {
    "u": [-0.721404672, 0.803987563, 0.422295958],
    "log": [-0.07214047, 0.773545921, 0.042229597, 0.763795912],
    "neg": [-1.072140455, -1.919601202, -0.957770407, -1.929351211],
    "ids": [11, 4, 36, 13],
}


@pytest.mark.parametrize("name", ["toy_small"])
class TestToy(zoo.testing.ModelTests):
    @pytest.fixture(autouse=True)
    def _toys(self, toys):
        """The plugin is registered while its tests run."""


def broken(monkeypatch, **attributes):
    import zoo_toys.models

    for name, value in attributes.items():
        monkeypatch.setattr(zoo_toys.models.Toy, name, value, raising=False)


def forward_of():
    import zoo_toys.models

    return zoo_toys.models.Toy.forward


def test_forward_that_is_not_finite(toys, monkeypatch):
    forward = forward_of()
    broken(monkeypatch, forward=lambda self, x: forward(self, x) / 0)
    with pytest.raises(AssertionError, match="not finite"):
        contract.check_forward("toy_small")


def test_forward_that_is_random(toys, monkeypatch):
    forward = forward_of()
    calls = iter(range(9))
    broken(monkeypatch, forward=lambda self, x: forward(self, x) + next(calls))
    with pytest.raises(AssertionError, match="run twice"):
        contract.check_forward("toy_small")


def test_forward_that_changes_its_input(toys, monkeypatch):
    forward = forward_of()
    broken(monkeypatch, forward=lambda self, x: forward(self, x.clamp_(-1, 1)))
    with pytest.raises(AssertionError, match="changed its input"):
        contract.check_forward("toy_small")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch says it in other words")
def test_forward_that_makes_a_tensor_on_the_cpu(toys, monkeypatch):
    forward = forward_of()
    broken(monkeypatch, forward=lambda self, x: forward(self, x) + torch.ones(3).sum(0, keepdim=True))
    with pytest.raises(AssertionError, match="on another device than the CPU"):
        contract.check_device("toy_small")


def test_parameters_without_a_gradient(toys, monkeypatch):
    forward = forward_of()
    broken(monkeypatch, forward=lambda self, x: forward(self, x.detach()).detach() + self.head.bias)
    with pytest.raises(AssertionError, match="parameters get no gradient"):
        contract.check_backward("toy_small")
    broken(monkeypatch, forward=forward, unused_parameters=("pair",))
    with pytest.raises(AssertionError, match="which do get a gradient"):
        contract.check_backward("toy_small")


def test_batches_that_mix(toys, monkeypatch):
    forward = forward_of()
    broken(monkeypatch, forward=lambda self, x: forward(self, x - x.mean(0, keepdim=True)))
    with pytest.raises(AssertionError, match="alone and in a batch"):
        contract.check_rows("toy_small")


def test_state_that_saving_loses(toys, monkeypatch):
    forward = forward_of()

    def grows(self, x):
        return forward(self, x) + getattr(self, "hidden", 0)

    broken(monkeypatch, forward=grows)
    real = contract.case("toy_small")
    build = Case.build

    def with_hidden(self, **kw):
        model = build(self, **kw)
        model.hidden = 3.0
        return model

    monkeypatch.setattr(Case, "build", with_hidden)
    with pytest.raises(AssertionError, match="after saving and loading"):
        contract.check_save_load(real)


def test_wrong_numbers_on_the_card(toys, monkeypatch):
    import msgspec

    c = zoo.testing.case("toy_small")
    other = Case(msgspec.structs.replace(c.card, params=341), c.config, c.specification)
    with pytest.raises(AssertionError, match="the card says 341 parameters, the model has 340"):
        contract.check_parameters(other)
    for field in ("description", "input", "licence_code"):
        lacking = Case(msgspec.structs.replace(c.card, **{field: {} if field == "input" else None}), c.config, {})
        with pytest.raises(AssertionError, match=f"lacks .*{field}"):
            contract.check_card(lacking)


def test_a_head_that_does_not_reset(toys, monkeypatch):
    broken(monkeypatch, reset_classifier=lambda self, n: None)
    with pytest.raises(AssertionError, match=r"after reset_classifier\(5\)"):
        contract.check_reset_head("toy_small")


def test_ends_that_change_too_much(toys, monkeypatch):
    from zoo.adapting import channels

    def adapt_state(self, state, overrides):
        if "in_chans" in overrides:
            return {**state, "stem.weight": channels(state["stem.weight"], 2)}, {"stem.weight": "converted"}
        state = {k: v for k, v in state.items() if not k.startswith("head")}
        return {**state, "pair": state["pair"] + 1}, {"head.weight": "new", "head.bias": "new"}

    broken(monkeypatch, adapt_state=adapt_state)
    with pytest.raises(AssertionError, match="also changed pair"):
        contract.check_adapt("toy_small")


class Recurrent(nn.Module):
    """y_t = sum of w * x up to t."""

    def __init__(self, leak: bool = False):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.leak = leak

    def forward(self, x, lengths=None):
        if lengths is not None and not self.leak:
            x = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        y = (x * self.w).cumsum(1)
        return y + x.sum(1, keepdim=True) if self.leak else y

    def init_state(self, batch):
        return torch.zeros(batch, 3)

    def step(self, x, state):
        state += x * self.w
        return state.clone()


@pytest.fixture
def sequence(toys, monkeypatch):
    import msgspec
    import zoo_toys.models

    monkeypatch.setattr(zoo_toys.models, "Recurrent", Recurrent, raising=False)
    c = zoo.testing.case("toy_small")
    card = msgspec.structs.replace(c.card, builder="zoo_toys.models:Recurrent", config={}, params=3)
    return lambda **config: Case(card, config, {"shape": [7, 3], "odd": [[1, 3], [5, 3]]})


def test_sequence_models(sequence):
    assert contract.check_step(sequence())
    assert contract.check_padding(sequence())
    assert contract.check_odd_sizes(sequence())
    with pytest.raises(AssertionError, match="step by step"):
        contract.check_step(sequence(leak=True))
    with pytest.raises(AssertionError, match="other padding"):
        contract.check_padding(sequence(leak=True))


def test_inputs_from_a_card():
    x = zoo.testing.draw({"shape": [5], "dtype": "int64", "range": [2, 4]}, 3)
    assert x.shape == (3, 5)
    assert set(x.flatten().tolist()) <= {2, 3}
    assert torch.equal(x, zoo.testing.draw({"shape": [5], "dtype": "int64", "range": [2, 4]}, 3))
    y = zoo.testing.draw({"shape": [50], "range": [0, 1]}, 2)
    assert 0 <= y.min() <= y.max() < 1
    assert zoo.testing.draw({"shape": [4], "batch": False}, 3).shape == (4,)
    assert zoo.testing.draw({"shape": [4], "dtype": "bool"}, 3).dtype == torch.bool
    with pytest.raises(zoo.errors.CardError, match="range"):
        zoo.testing.draw({"shape": [4], "dtype": "int64"}, 3)


def test_comparison():
    a = torch.tensor([1.0, 100.0])
    assert zoo.testing.relative_error(a + 1, a) == pytest.approx(0.01)
    assert zoo.testing.relative_error(a, torch.tensor([1.0, float("nan")])) == float("inf")
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    assert zoo.testing.relative_error(nan, nan) == 0
    assert zoo.testing.relative_error(torch.ones(1), torch.zeros(1)) == float("inf")
    with pytest.raises(AssertionError, match="integers differ"):
        zoo.testing.assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="shape"):
        zoo.testing.assert_close(a, a[:1])
    with pytest.raises(AssertionError, match=r"relative error 0\.01"):
        zoo.testing.assert_close(a + 1, a)
    c = torch.tensor([1 + 1j, 2])
    assert zoo.testing.assert_close(c, c) == 0


def test_procedural_values_are_the_recorded_ones():
    values = zoo.testing.procedural_values
    assert values("a.b", [3], ["u", 1.0, 0.0]).tolist() == pytest.approx(RECORDED["u"], abs=1e-7)
    assert values("a.b", [2, 2], ["log_arange", 0.1, 0]).flatten().tolist() == pytest.approx(RECORDED["log"], abs=1e-7)
    assert values("a.b", [2, 2], ["neg_arange", 0.1, 0]).flatten().tolist() == pytest.approx(RECORDED["neg"], abs=1e-7)
    assert values("a.b", [4], ["ids", 50, 3], salt="s").tolist() == RECORDED["ids"]
    assert values("a.b", [], ["u", 1, 2]).shape == ()
    with pytest.raises(ValueError, match="fill kind"):
        values("a", [1], ["normal", 1, 0])


def fullsize_card(**changes):
    from toy_weights import original, toy

    keys = {k: {"shape": list(v.shape), "fill": ["u", 0.3, 0]} for k, v in original(toy()).items()}
    del keys["counter"], keys["down.w"]
    card = {
        "system": "toy",
        "variant": "small",
        "zoo_name": "toy_small",
        "source": "x:Toy",
        "config": {"dim": 8, "classes": 4},
        "params": 340,
        "salt": "",
        "keys": keys,
        "other_keys": {"counter": []},
        "tied": [["up.w", "down.w"]],
        "inputs": {"image": {"shape": [1, 3, 6, 6], "fill": ["u", 1, 0]}},
        "call": "forward(image) -> logits",
        "tolerance": 1e-4,
    }
    state = zoo.testing.procedural_state(card)
    with torch.no_grad():
        logits = zoo.reference("toy").build(card["config"], state)(zoo.testing.procedural_inputs(card)["image"])
    card["outputs"] = {"logits": summary(logits)}
    return {**card, **changes}


def summary(x):
    return {
        "shape": list(x.shape),
        "mean": x.mean().item(),
        "std": x.std().item(),
        "l2": x.norm().item(),
        "at": [[i, v] for i, v in enumerate(x.flatten().tolist())],
    }


def test_fullsize(toys, tmp_path):
    def check(card, **options):
        (tmp_path / "card.json").write_text(json.dumps(card))
        return zoo.testing.check_fullsize(tmp_path / "card.json", **options)

    card = fullsize_card()
    assert check(card)["logits"] < 1e-6
    assert check(card, forward=False) == {}
    with pytest.raises(AssertionError, match="340 parameters, the original 341"):
        check({**card, "params": 341})
    with pytest.raises(AssertionError, match="toy_large has"):
        check({**card, "zoo_name": "toy_large"})
    wrong = json.loads(json.dumps(card))
    wrong["outputs"]["logits"]["at"][1][1] += 0.1
    with pytest.raises(AssertionError, match="relative l2"):
        check(wrong)
    extra = json.loads(json.dumps(card))
    extra["keys"]["unknown.weight"] = {"shape": [2], "fill": ["u", 1, 0]}
    with pytest.raises(zoo.errors.KeysDoNotMatch, match=r"unknown\.weight"):
        check(extra)
    with pytest.raises(zoo.errors.UnknownSystem):
        check({**card, "system": "absent"})
    more = {**card, "outputs": {**card["outputs"], "features": card["outputs"]["logits"]}}
    with pytest.raises(AssertionError, match="were not computed"):
        check(more)


def test_fullsize_statistics_cover_what_was_not_sampled():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    card = summary(x) | {"at": [[0, x[0].item()]]}
    assert _compare(x, card, 1e-4, "x") < 1e-6
    y = x.clone()
    y[50] += 3
    with pytest.raises(AssertionError, match=r"l2|mean"):
        _compare(y, card, 1e-4, "x")


def test_golden(toys, tmp_path):
    from safetensors.torch import save_file
    from toy_weights import original, toy

    model = toy()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    logits = model(x)
    logits.pow(2).mean().backward()
    tensors = {f"state/{k}": v.detach().clone().contiguous() for k, v in original(model).items()}
    tensors |= {"in/image": x, "out/logits": logits.detach(), "grad/conv.weight": model.stem.weight.grad}
    meta = {"system": "toy", "source": "x:Toy", "config": json.dumps({"dim": 8, "classes": 4}), "call": "forward"}

    def check(tensors, **options):
        save_file(tensors, tmp_path / "g.safetensors", metadata=meta)
        return zoo.testing.check_golden(tmp_path / "g.safetensors", **options)

    assert max(check(tensors).values()) < 1e-6
    assert "grad/conv.weight" in check(tensors, grad=True)
    with pytest.raises(AssertionError, match="out/logits: relative error"):
        check({**tensors, "out/logits": logits.detach() + 1})
    with pytest.raises(AssertionError, match="were not recomputed"):
        check({**tensors, "mid/features": logits.detach().clone()})
    assert check({**tensors, "mid/features": logits.detach().clone()}, skip_mid=("features",))
    meta["system"] = "absent"
    with pytest.raises(zoo.errors.UnknownSystem):
        check(tensors)


def test_a_compressed_golden_file_is_read_by_either_name(tmp_path):
    source = Path(__file__).parents[1] / "golden" / "rsmamba__forward_cls_head.safetensors"
    (tmp_path / "g.safetensors.xz").write_bytes(lzma.compress(source.read_bytes()))
    plain = read_golden(source)
    for name in ("g.safetensors", "g.safetensors.xz"):
        packed = read_golden(tmp_path / name)
        assert (packed.system, packed.config, packed.mids_of) == (plain.system, plain.config, plain.mids_of)
        assert packed.state.keys() == plain.state.keys()
        assert all(torch.equal(packed.state[k], plain.state[k]) for k in plain.state)
    with pytest.raises(FileNotFoundError):
        read_golden(tmp_path / "none.safetensors")
