"""``zoo.load``: from names, folders, files and shards; every mistake gets a sentence."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from toy_weights import original, toy

import zoo
from zoo import errors

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def same(model):
    with torch.no_grad():
        return torch.equal(model(X), toy()(X))


def test_by_name(toys):
    for name in ("toy_small", "toy_small.packed"):
        model = zoo.load(name)
        assert same(model)
        assert not model.training
        assert model.zoo_info.name == "toy_small.packed"
        assert model.zoo_info.source.endswith("toy.safetensors")


def test_the_file_is_mapped_not_read(toys, packed_weights):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    model = zoo.load("toy_small")
    assert str(packed_weights) in maps.read_text()
    assert model.down.weight is model.up.weight


def test_writing_to_a_loaded_model_does_not_change_the_file(toys, packed_weights):
    before = packed_weights.read_bytes()
    with torch.no_grad():
        zoo.load("toy_small").stem.weight.add_(1)
    assert packed_weights.read_bytes() == before
    assert same(zoo.load("toy_small"))


def test_dtype_and_device(toys):
    model = zoo.load("toy_small", dtype=torch.bfloat16)
    assert model.stem.weight.dtype == torch.bfloat16
    assert zoo.load("toy_small", dtype="float64").ramp.dtype == torch.float64
    assert zoo.load("toy_small", device="cpu").stem.weight.device.type == "cpu"


def test_the_card_says_what_stored_weights_become(toys, tmp_path):
    assert zoo.load("toy_small.small").ramp.dtype == torch.bfloat16
    assert zoo.load("toy_small.small", dtype="float32").ramp.dtype == torch.float32
    folder = zoo.save(zoo.load("toy_small.small", dtype="float32"), tmp_path / "saved")
    assert zoo.load(folder).ramp.dtype == torch.float32, "a saved folder holds what it was given"


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("toy_smal", errors.UnknownModel, "nearest: toy_small"),
        ("toy_small.pakced", errors.UnknownTag, "toy_small.packed (default)"),
        ("toy_small.elsewhere", errors.NotOnHub, "https://example.org/toy.pth"),
        ("toy_large", errors.NoWeights, "zoo.create('toy_large')"),
        ("a/b", errors.BadName, "hf-hub:a/b"),
        ("./nowhere", errors.LocalFileMissing, "nowhere"),
        ("hf-hub:x", errors.BadName, "ORGANISATION/REPOSITORY"),
    ],
)
def test_mistakes(toys, source, error, text):
    with pytest.raises(error) as caught:
        zoo.load(source)
    assert text in str(caught.value)


def test_offline(toys, tmp_path):
    with pytest.raises(errors.NotCached, match=r"hf download toys/original toy\.pth"):
        zoo.load("toy_small.original", cache_dir=tmp_path, local_files_only=True)


def test_folder(toys, tmp_path, monkeypatch):
    zoo.save(zoo.load("toy_small"), tmp_path / "saved")
    model = zoo.load(tmp_path / "saved")
    assert same(model)
    assert model.zoo_info.weights.metrics[0].value == 0.5
    monkeypatch.chdir(tmp_path)
    assert same(zoo.load("./saved"))
    assert same(zoo.load("./saved/model.safetensors"))


def test_shards(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "s", shard_bytes=400)
    parts = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert same(zoo.load(folder))
    (folder / parts[1]).unlink()
    with pytest.raises(errors.LocalFileMissing, match=parts[1]):
        zoo.load(folder)


def test_a_newer_format(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "new")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"format": 99, "zoo_version": "7.0"}))
    with pytest.raises(errors.FormatTooNew, match=r"zoo 7\.0 in format 99.*pip install -U ssm-zoo"):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [('{"model_type": "bert"}', "of 'bert'"), ("[1]", "another library"), ("{", "not JSON")],
)
def test_folders_of_others(toys, tmp_path, content, text):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "other")
    (folder / "config.json").write_text(content)
    with pytest.raises(errors.BadCheckpoint, match=text):
        zoo.load(folder)


def test_a_folder_of_a_plugin_that_is_not_installed(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "x")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(table | {"architecture": "strange_net", "plugin": {"name": "zoo-strange", "version": "1"}})
    )
    with pytest.raises(errors.UnknownModel) as caught:
        zoo.load(folder)
    assert any("pip install zoo-strange" in note for note in caught.value.__notes__)


def test_bare_file_without_its_model(toys, tmp_path):
    from zoo.checkpoints import write_safetensors

    write_safetensors(toy().state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(errors.BadCheckpoint, match=r"zoo\.load\('ARCHITECTURE', checkpoint="):
        zoo.load(tmp_path / "bare.safetensors")
    assert same(zoo.load("toy_small", checkpoint=tmp_path / "bare.safetensors"))


def test_own_checkpoint_in_the_originals_format(toys, cache, tmp_path):
    torch.save({"model": original(toy()), "epoch": 3}, tmp_path / "o.pth")
    model = zoo.load("toy_small", checkpoint=tmp_path / "o.pth")
    assert same(model)
    assert model.zoo_info.tag is None
    assert str(tmp_path / "o.pth") in model.zoo_info.source
    made = list((tmp_path / "assets").rglob("toy-*.safetensors"))
    assert len(made) == 1
    stamp = made[0].stat().st_mtime_ns
    assert same(zoo.load("toy_small", checkpoint=tmp_path / "o.pth"))
    assert made[0].stat().st_mtime_ns == stamp, "converted once"


def test_own_checkpoint_in_the_zoos_format(toys, cache, tmp_path):
    torch.save({"state_dict": toy().state_dict()}, tmp_path / "z.pth")
    assert same(zoo.load("toy_small", checkpoint=tmp_path / "z.pth"))
    torch.save({f"module.{k}": v for k, v in toy().state_dict().items()}, tmp_path / "d.pth")
    assert same(zoo.load("toy_small", checkpoint=tmp_path / "d.pth"))


def test_own_checkpoint_of_something_else(toys, cache, tmp_path):
    torch.save({"x.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(errors.KeysDoNotMatch, match=r"x\.weight"):
        zoo.load("toy_small", checkpoint=tmp_path / "x.pth")
    torch.save(original(toy(width=16)), tmp_path / "wide.pth")
    with pytest.raises(errors.KeysDoNotMatch, match="another size or variant"):
        zoo.load("toy_small", checkpoint=tmp_path / "wide.pth")
    incomplete = original(toy())
    del incomplete["second"]
    torch.save(incomplete, tmp_path / "half.pth")
    with pytest.raises((errors.BadCheckpoint, errors.KeysDoNotMatch)):
        zoo.load("toy_small", checkpoint=tmp_path / "half.pth")


def test_checkpoint_belongs_to_a_name(toys, tmp_path):
    folder = zoo.save(zoo.load("toy_small"), tmp_path / "f")
    with pytest.raises(errors.BadArgument, match="checkpoint= belongs to the name"):
        zoo.load(folder, checkpoint=folder / "model.safetensors")


def test_corrected_adapters_do_not_meet_what_the_old_one_converted(toys, cache, tmp_path, monkeypatch):
    from zoo import conversion
    from zoo_registry import resolve

    card = resolve("toy_small").card
    first = conversion._key("toy", card, None)
    monkeypatch.setattr(conversion, "checkpoints", torch)  # any other code
    assert conversion._key("toy", card, None) != first


def test_no_warning_on_an_ordinary_load(toys, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.load("toy_small")
    assert not [r for r in caplog.records if r.name == "zoo"]
