"""``zoo.save`` and its model card; ``zoo.convert`` in both directions."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from toy_weights import original, toy

import zoo
from zoo import errors
from zoo.checkpoints import metadata, read_safetensors


def test_what_a_folder_holds(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "f", notes="Trained for a test.")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    table = json.loads((folder / "config.json").read_text())
    assert table["library"] == "zoo"
    assert table["architecture"] == "toy_small"
    assert table["model_args"] == {"width": 8}
    assert table["pretrained_cfg"]["licence"] == "mit"
    assert "package_file" not in table["pretrained_cfg"]
    said = metadata(folder / "model.safetensors")
    assert said["format"] == "pt"
    assert said["architecture"] == "toy_small"
    assert json.loads(said["zoo_config"]) == table
    assert "down.weight" not in read_safetensors([folder / "model.safetensors"]), "a tied tensor is written once"


def test_the_model_card(toys, tmp_path):
    text = (zoo.save(zoo.load("toy_small"), tmp_path / "f", notes="Trained for a test.") / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.library_name == "zoo"
    assert "state-space-model" in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.5
    for words in ("Trained for a test.", "| accuracy | 0.5 | toys |", "zoo.load(", "licence of the weights: mit"):
        assert words in text
    assert "pip install ssm-zoo" in text


def test_no_licence_is_invented(toys, tmp_path):
    text = (zoo.save(zoo.create("toy_small"), tmp_path / "f") / "README.md").read_text()
    assert ModelCard(text).data.license is None
    assert "licence of the weights: not stated" in text
    named = (zoo.save(zoo.create("toy_small"), tmp_path / "g", licence="My Own 1.0") / "README.md").read_text()
    assert ModelCard(named).data.license == "other"
    assert ModelCard(named).data.license_name == "my own 1.0"


def test_published_figures_do_not_pass_to_other_weights(toys, tmp_path):
    torch.save(toy().state_dict(), tmp_path / "own.pth")
    folder = zoo.save(zoo.load("toy_small", checkpoint=tmp_path / "own.pth"), tmp_path / "f")
    facts = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert "metrics" not in facts
    assert "licence" not in facts


def test_labels(toys, tmp_path):
    model = zoo.load("toy_small", num_classes=2)
    assert zoo.pipeline(model).labels() is None
    folder = zoo.save(model, tmp_path / "f", labels=["yes", "no"])
    assert zoo.pipeline(folder).labels() == ["yes", "no"]
    assert zoo.pipeline("toy_small").labels() == ["ant", "bee", "cat", "dog"]
    again = zoo.save(zoo.load(folder), tmp_path / "g")
    assert zoo.pipeline(again).labels() == ["yes", "no"]


def test_a_head_changed_after_loading(toys, tmp_path):
    model = zoo.load("toy_small")
    model.head = torch.nn.Linear(8, 6)
    model.num_classes = 6
    again = zoo.load(zoo.save(model, tmp_path / "f"))
    assert torch.equal(again.head.weight, model.head.weight)


def test_names_and_figures_of_an_old_head_do_not_pass_to_a_new_one(toys, tmp_path):
    changed = zoo.load("toy_small")
    changed.head, changed.num_classes = torch.nn.Linear(8, 3), 3
    kept = json.loads((zoo.save(zoo.load("toy_small"), tmp_path / "kept") / "config.json").read_text())
    assert "metrics" in kept["pretrained_cfg"]
    for model in (changed, zoo.load("toy_small", num_classes=3)):
        assert zoo.pipeline(model).labels() is None
        folder = zoo.save(model, tmp_path / "f")
        facts = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        assert not {"metrics", "labels", "num_classes", "tag"} & set(facts)
        assert facts.get("licence") == kept["pretrained_cfg"].get("licence")  # the rest is still theirs
        assert zoo.pipeline(folder).labels() is None


def test_layers_changed_by_hand(toys, tmp_path):
    model = zoo.load("toy_small")
    model.head = torch.nn.Linear(8, 6)
    with pytest.raises(errors.KeysDoNotMatch, match="changed after it was built"):
        zoo.save(model, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_foreign_modules(tmp_path):
    with pytest.raises(errors.BadArgument, match="did not build"):
        zoo.save(torch.nn.Linear(1, 1), tmp_path / "f")


def test_nothing_is_left_behind(toys, tmp_path, monkeypatch):
    from zoo import checkpoints

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(errors.DiskFull):
        zoo.save(zoo.load("toy_small"), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_folder(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "f", shard_bytes=400)
    (folder / "mine.txt").write_text("kept")
    zoo.save(zoo.load("toy_small", num_classes=2), folder)
    assert zoo.load(folder).head.out_features == 2
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "mine.txt", "model.safetensors"]
    assert len(list(tmp_path.iterdir())) == 1


def test_convert_there_and_back(toys, cache, tmp_path):
    theirs = original(toy())
    torch.save({"model": theirs}, tmp_path / "o.pth")
    folder = zoo.convert(tmp_path / "o.pth", tmp_path / "ours", model="toy_small")
    assert torch.equal(zoo.load(folder).pair, toy().pair)
    back = torch.load(zoo.convert(folder, tmp_path / "back.pth", to="reference"), weights_only=True)
    assert back.keys() == theirs.keys() - {"counter"}
    assert all(torch.equal(back[k], theirs[k]) for k in back)
    again = read_safetensors([zoo.convert("toy_small", tmp_path / "b.safetensors", to="reference")])
    assert torch.equal(again["first"], theirs["first"])


def test_convert_by_system(toys, cache, tmp_path):
    torch.save(original(toy()), tmp_path / "o.pth")
    out = zoo.convert(tmp_path / "o.pth", tmp_path / "z.safetensors", system="toy", config={"dim": 8, "classes": 4})
    assert torch.equal(read_safetensors([out])["pair"], toy().pair)
    back = zoo.convert(out, tmp_path / "b.safetensors", to="reference", system="toy")
    assert set(read_safetensors([back])) == set(original(toy())) - {"counter"}


def test_convert_mistakes(toys, tmp_path):
    torch.save(original(toy()), tmp_path / "o.pth")
    with pytest.raises(errors.BadArgument, match="give model"):
        zoo.convert(tmp_path / "o.pth", tmp_path / "x")
    with pytest.raises(errors.BadArgument, match="expected 'zoo' or 'reference'"):
        zoo.convert(tmp_path / "o.pth", tmp_path / "x", to="onnx")


def test_from_reference(toys):
    model = zoo.from_reference("toy", {"dim": 8, "classes": 4}, original(toy()))
    assert torch.equal(model.pair, toy().pair)
    broken = original(toy())
    del broken["conv.bias"]
    with pytest.raises(errors.KeysDoNotMatch, match=r"stem\.bias"):
        zoo.from_reference("toy", {"dim": 8, "classes": 4}, broken)


def test_what_is_said_of_a_model_is_looked_at(toys, tmp_path, caplog):
    model = zoo.load("toy_small")
    for options, words in (
        ({"labels": "abcd"}, "expected a list of texts"),
        ({"licence": 3}, "licence is 3"),
        ({"metrics": [{"name": "accuracy", "value": 0.5}]}, "dataset"),
        ({"metrics": [{"name": "accuracy", "value": "high", "dataset": "d"}]}, "a number"),
    ):
        with pytest.raises(errors.BadArgument, match=words):
            zoo.save(model, tmp_path / "f", **options)
        assert list(tmp_path.iterdir()) == []
    figures = [{"name": n, "value": v, "dataset": "d"} for n, v in (("kept", 0.5), ("lost", float("nan")))]
    zoo.save(model, tmp_path / "f", labels=["a"], metrics=figures)
    assert "labels has 1 names and the model 4 classes" in caplog.text
    assert "the figure lost is nan and is not saved" in caplog.text
    table = json.loads((tmp_path / "f" / "config.json").read_text())
    assert [m["name"] for m in table["pretrained_cfg"]["metrics"]] == ["kept"]
    figures = [{"name": "kept", "value": v, "dataset": "d"} for v in (np.float32(0.5), np.int64(7), 3)]
    zoo.save(model, tmp_path / "g", metrics=figures)
    table = json.loads((tmp_path / "g" / "config.json").read_text())
    assert [m["value"] for m in table["pretrained_cfg"]["metrics"]] == [0.5, 7, 3]


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_as_itself(wrap, toys, tmp_path):
    model = zoo.load("toy_small")
    again = zoo.load(zoo.save(wrap(model), tmp_path / "f"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_arguments_of_another_kind(toys):
    with pytest.raises(errors.BadArgument, match="config is a NoneType"):
        zoo.from_reference("toy", None, {})
    for source in (None, 3, b"toy_small", torch.nn.Linear(1, 1)):
        with pytest.raises(errors.BadName, match=f"a {type(source).__name__} was given"):
            zoo.load(source)
    with pytest.raises(errors.BadArgument, match="'meta', which holds no numbers"):
        zoo.load("toy_small", device="meta")
    with pytest.raises(errors.BadFilter, match="no filter 'domian'; nearest: domain"):
        zoo.list(domian="toys")
    with pytest.raises(errors.BadFilter, match="pattern is 3"):
        zoo.list(3)
    assert zoo.list(p for p in ["toy_small.packed"]) == ["toy_small.packed"]
