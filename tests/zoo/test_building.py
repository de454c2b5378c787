"""Building without memory, filling strictly, restoring what a state dict does not carry."""

import pytest
import torch
from torch import nn

import zoo
from zoo import building, errors
from zoo_registry import WeightsCard, resolve


def card():
    return resolve("toy_small").card


def test_create(toys):
    model = zoo.create("toy_small", num_classes=2)
    assert model.training
    assert model.head.out_features == 2
    assert model.zoo_info.architecture == "toy_small"
    assert model.zoo_info.config == {"width": 8, "num_classes": 2}
    assert zoo.create("toy_small", dtype=torch.float64).stem.weight.dtype == torch.float64
    assert zoo.create("toy_small", device="meta").stem.weight.is_meta
    assert zoo.create("toy_large").stem.weight.shape[0] == 16


@pytest.mark.parametrize("argument", ["num_clases", "nonsense"])
def test_create_with_a_wrong_argument(toys, argument):
    with pytest.raises(errors.BadArgument, match=f"toy_small has no argument '{argument}'") as caught:
        zoo.create("toy_small", **{argument: 3})
    assert isinstance(caught.value, TypeError)
    assert ("num_classes" in str(caught.value)) or argument == "nonsense"


def test_a_wrong_argument_behind_kwargs(toys, monkeypatch):
    import zoo_toys.models

    monkeypatch.setattr(zoo_toys.models, "make", lambda **kw: zoo_toys.models.Toy(**kw), raising=False)
    import msgspec

    other = msgspec.structs.replace(card(), builder="zoo_toys.models:make")
    with pytest.raises(errors.BadArgument, match="has no argument 'depth'"):
        building.construct(other, {"depth": 3})


def test_fill_is_strict_and_changes_nothing(toys):
    model = zoo.create("toy_small")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state.pop("pair")
    state["extra"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(9)
    with pytest.raises(errors.KeysDoNotMatch) as caught:
        building.fill(model, state, what="a test")
    assert caught.value.missing == ("pair",)
    assert caught.value.unexpected == ("extra",)
    assert caught.value.mismatched == {"head.bias": ((9,), (4,))}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fill_assigns_without_a_copy_and_keeps_ties(toys):
    model = building.skeleton(card(), {"width": 8})
    state = {k: v for k, v in zoo.create("toy_small").state_dict().items() if k != "down.weight"}
    building.fill(model, state)
    assert model.stem.weight.data_ptr() == state["stem.weight"].data_ptr()
    assert model.down.weight is model.up.weight
    assert model.stem.weight.requires_grad


def test_ties_that_the_file_breaks(toys):
    state = zoo.create("toy_small").state_dict()
    state["down.weight"] = state["up.weight"] + 1
    with pytest.raises(errors.BadCheckpoint, match="one tensor in this model but differ"):
        building.fill(building.skeleton(card(), {"width": 8}), state)


def test_requires_grad_is_the_models(toys):
    model = zoo.create("toy_small")
    model.pair.requires_grad_(False)
    building.fill(model, model.state_dict())
    assert not model.pair.requires_grad


def test_derived_tensors_are_restored(toys):
    model = building.skeleton(card(), {"width": 8})
    building.fill(model, zoo.create("toy_small").state_dict())
    assert set(building.left_on_meta(model)) == {"ramp", "offset"}
    building.restore_derived(model, card(), {"width": 8})
    assert building.left_on_meta(model) == []
    assert torch.equal(model.ramp, torch.linspace(0, 1, 8))
    assert torch.equal(model.offset, torch.arange(8) * 0.01)
    assert model.stem.weight.abs().sum() > 0, "restoring must not touch the weights"


def test_modules_that_restore_their_own_buffers(toys, monkeypatch):
    import zoo_toys.models

    def own(self):
        self.ramp.copy_(torch.full((8,), 5.0))

    monkeypatch.setattr(zoo_toys.models.Toy, "init_non_persistent_buffers", own, raising=False)
    model = building.skeleton(card(), {"width": 8})
    building.fill(model, zoo.create("toy_small").state_dict())
    building.restore_derived(model, card(), {"width": 8})
    assert model.ramp[0] == 5


def test_models_that_cannot_be_built_on_meta(toys, monkeypatch):
    import zoo_toys.models

    init = zoo_toys.models.Toy.__init__

    def impatient(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.largest = self.ramp.max().item()

    monkeypatch.setattr(zoo_toys.models.Toy, "__init__", impatient)
    model = building.skeleton(card(), {"width": 8})
    assert model.largest == 1.0
    assert not model.stem.weight.is_meta


def test_building_without_initialisation_computes_buffers_only(toys):
    assert torch.equal(building.uninitialised(card(), {"width": 8}).ramp, torch.linspace(0, 1, 8))
    with building._SkipRandom():
        weight = nn.Parameter(torch.full((3,), 7.0))
        nn.init.normal_(weight)
        nn.init.zeros_(weight)
        noise = torch.full((3,), 7.0).uniform_()
        table = torch.full((3,), 7.0).zero_()
    assert (weight == 7).all()
    assert (noise == 7).all()
    assert (table == 0).all(), "what is computed without chance is computed"


def test_extra_state():
    class Counted(nn.Linear):
        calls = 3

        def get_extra_state(self):
            return self.calls

        def set_extra_state(self, value):
            self.calls = value

    model = Counted(2, 2)
    state = model.state_dict() | {"_extra_state": 9}
    building.fill(model, state)
    assert model.calls == 9


def test_a_trained_model_says_so_and_its_folder_too(toys, tmp_path):
    model = zoo.create("toy_small", num_classes=2)
    old = WeightsCard(
        tag="pile", where="there", licence="MIT", preprocess={"tokenizer": "org/words", "length": 5}, labels="names",
        companions={"org/words": ("a.json",), "org/other": ("b.json",)}, metrics=(),
    )  # fmt: skip
    model.zoo_info.weights, model.zoo_info.tag = old, "pile"
    model.zoo_info.changes.append("head (num_classes=2): new")
    building.trained(model, "letters", {"tokenizer": "org/words", "size": (3, 4)}, ["a", "b"])
    info = model.zoo_info
    assert (info.name, info.source, info.changes) == ("toy_small", "trained on letters", [])
    assert (info.weights.licence, info.weights.labels) == ("MIT", None)
    assert info.weights.preprocess == {"tokenizer": "org/words", "size": [3, 4]}
    assert info.weights.companions == {"org/words": ("a.json",)}
    again = zoo.load(zoo.save(model, tmp_path / "out")).zoo_info
    assert (again.weights.licence, again.weights.preprocess) == ("MIT", info.weights.preprocess)
    assert again.weights.companions == info.weights.companions
    assert again.folder_config["labels"] == ["a", "b"]

    building.trained(model, "more letters")  # prepared as before; classes without names
    assert model.zoo_info.weights.preprocess == info.weights.preprocess
    assert model.zoo_info.folder_config == {}
