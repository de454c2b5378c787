"""Other classes and channels: what changes is declared, everything else is an error."""

import pytest
import torch
from torch import nn
from toy_weights import original, toy

import zoo
from zoo import errors
from zoo.adapting import Converted, InputChannels, NewHead, adapt, channels, ends_of


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 7])
def test_channels_follow_timms_rule(wanted):
    from timm.models._manipulate import adapt_input_conv

    weight = torch.randn(5, 3, 2, 2)
    assert torch.allclose(channels(weight, wanted), adapt_input_conv(wanted, weight), atol=1e-6)


def test_channels_keep_dtype_and_grey_images():
    weight = torch.randn(5, 3, 2, 2)
    grey = torch.randn(1, 1, 4, 4)
    whole = torch.conv2d(grey.expand(1, 3, 4, 4), weight)
    assert torch.allclose(torch.conv2d(grey, channels(weight, 1)), whole, atol=1e-5)
    assert channels(weight.bfloat16(), 4).dtype == torch.bfloat16
    assert channels(torch.randn(4, 6), 2).shape == (4, 2)


def test_num_classes_and_in_chans(toys, caplog):
    base = zoo.load("toy_small")
    other = zoo.load("toy_small", num_classes=9, in_chans=1)
    assert other.head.weight.shape == (9, 8)
    assert torch.isfinite(other.head.weight).all()
    assert torch.allclose(other.stem.weight, base.stem.weight.sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(other.pair, base.pair)
    said = "\n".join(other.zoo_info.changes)
    assert "head.weight: initialised anew (num_classes=9)" in said
    assert "stem.weight: converted from 3 to 1 input channels (in_chans=1)" in said
    assert "head.weight initialised anew" in caplog.text
    assert other.zoo_info.weights.labels is None, "labels of four classes say nothing about nine"


def test_the_same_number_changes_nothing(toys):
    model = zoo.load("toy_small", num_classes=4)
    assert model.zoo_info.changes == []
    assert torch.equal(model.head.weight, zoo.load("toy_small").head.weight)


def test_new_heads_are_random_each_time(toys):
    first, second = zoo.load("toy_small", num_classes=9), zoo.load("toy_small", num_classes=9)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_what_no_argument_accounts_for_is_an_error(toys):
    with pytest.raises(errors.KeysDoNotMatch, match=r"stem\.weight: \(8, 3, 3, 3\) in the file"):
        zoo.load("toy_small", width=16)
    with pytest.raises(errors.KeysDoNotMatch) as caught:
        zoo.load("toy_small", width=16)
    assert any("does not say how these change" in note for note in caught.value.__notes__)


def test_arguments_without_weights_pass(toys):
    assert zoo.load("toy_small", bias=0.5).zoo_info.changes == []


def test_own_method(toys, monkeypatch):
    import zoo_toys.models

    def adapt_state(self, state, overrides):
        return {**state, "pair": state["pair"] * 2}, {"pair": f"doubled for {overrides}"}

    monkeypatch.setattr(zoo_toys.models.Toy, "adapt_state", adapt_state, raising=False)
    model = zoo.load("toy_small", bias=1.0)
    assert torch.equal(model.pair, toy().pair * 2)
    assert model.zoo_info.changes == ["pair: doubled for {'bias': 1.0}"]


def test_dropped_keys():
    model = nn.Linear(2, 2)
    model.dropped_keys = frozenset({"head.weight"})
    state, report = adapt(model, {**model.state_dict(), "head.weight": torch.zeros(1)}, {})
    assert set(state) == {"weight", "bias"}
    assert report == {}


def test_converted():
    model = nn.Module()
    model.position = nn.Parameter(torch.zeros(1, 9, 2))
    model.ends = {"size": Converted("position", lambda x, shape: x.new_ones(shape))}
    state, report = adapt(model, {"position": torch.zeros(1, 4, 2)}, {"size": 3})
    assert state["position"].shape == (1, 9, 2)
    assert report["position"] == "converted from (1, 4, 2) to (1, 9, 2) (size=3)"


def test_removed_head():
    model = nn.Sequential()
    state, report = adapt_with(model, {"head.weight": torch.zeros(1)}, NewHead("head"))
    assert state == {}
    assert report == {"head.weight": "left out (num_classes=0)"}


def adapt_with(model, state, end):
    model.ends = {"num_classes": end}
    return adapt(model, state, {"num_classes": 0})


def test_timms_habit():
    model = nn.Module()
    model.default_cfg = {"classifier": ("head.fc", "head2"), "first_conv": "stem.0"}
    assert ends_of(model) == {
        "num_classes": (NewHead("head.fc", "head2"),),
        "in_chans": (InputChannels("stem.0.weight"),),
    }
    assert ends_of(nn.Module()) == {}


def test_original_checkpoints_too(toys, cache, tmp_path):
    torch.save(original(toy()), tmp_path / "o.pth")
    model = zoo.load("toy_small", checkpoint=tmp_path / "o.pth", num_classes=2)
    assert model.head.weight.shape == (2, 8)
    assert torch.equal(model.pair, toy().pair)
