"""Cards: what they accept, what they refuse and in which words, and how they are read from files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo_registry import Metric, ModelCard, WeightsCard, load_cards, package_path, read_cards, read_labels
from zoo_registry.errors import CardError, LocalFileMissing

MODEL = {"name": "toy_small", "system": "toy", "domain": "toys", "task": "a-task", "builder": "toys.models:Toy"}
HUB = {"tag": "in1k", "repo_id": "org/repo", "filename": "model.safetensors"}

FILE = """
[defaults]
system = "toy"
domain = "toys"
task = "image-classification"
builder = "toys.models:Toy"
config = { depth = 2, width = 8 }

[weights_defaults]
licence = "apache-2.0"
format = "torch"

[models.toy_small]
params = 12
config = { width = 16 }
default_tag = "in1k"
aliases = ["toy_s"]

[models.toy_small.weights.in1k]
repo_id = "org/toy"
filename = "toy.pth"
metrics = [{ name = "top-1", value = 76.1, dataset = "ImageNet-1k", split = "val", source = "README" }]

[models.toy_small.weights.off]
where = "a drive: https://example.org/toy.pth"
licence = "mit"

[models.toy_big]
system = "other"
"""


def make_package(folder: Path, name: str = "zoo_toys_pkg", text: str = FILE, **files: str) -> str:
    package = folder / name
    (package / "cards").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('cards are read without importing the package')")
    if text:
        (package / "cards" / "toy.toml").write_text(text)
    for relative, content in files.items():
        path = package / relative.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return name


def test_load_cards_merges_defaults_and_never_imports_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    small, big = load_cards(make_package(tmp_path))
    assert small.config == {"depth": 2, "width": 16}  # tables are merged key by key, the model's own win
    assert (small.system, big.system) == ("toy", "other")
    assert big.config == {"depth": 2, "width": 8}
    assert small.package == "zoo_toys_pkg"
    in1k, off = small.weights.values()
    assert (in1k.licence, off.licence) == ("apache-2.0", "mit")
    assert in1k.tag == "in1k"
    assert in1k.metrics == (Metric(name="top-1", value=76.1, dataset="ImageNet-1k", split="val", source="README"),)
    assert in1k.loadable
    assert in1k.on_hub
    assert not off.loadable
    assert small.default_weights is in1k
    assert big.default_weights is None


def test_load_cards_takes_the_folder_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    make_package(tmp_path)
    cards = load_cards(tmp_path / "zoo_toys_pkg" / "cards")
    assert [c.name for c in cards] == ["toy_small", "toy_big"]
    assert cards[0].package == "zoo_toys_pkg"


def test_without_default_tag_the_first_loadable_weights_are_meant():
    off = WeightsCard(tag="off", where="a drive")
    hub = WeightsCard(**HUB)
    assert ModelCard(**MODEL, weights={"off": off, "in1k": hub}).default_weights is hub
    assert ModelCard(**MODEL, weights={"off": off}).default_weights is off


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Toy-Small"}, ["name", "'Toy-Small'", "lower case"]),
        ({"name": "1toy"}, ["name", "beginning with a letter"]),
        ({"name": "toy.small"}, ["name"]),
        ({"system": "Toy"}, ["system"]),
        ({"domain": "remote-sensing"}, ["domain", "'remote-sensing'"]),
        ({"task": "Image Classification"}, ["task", "image-classification"]),
        ({"builder": "toys.models.Toy"}, ["builder", "package.module:callable"]),
        ({"aliases": ("Old",)}, ["aliases", "'Old'"]),
        ({"aliases": ("toy_small",)}, ["aliases", "own name"]),
        ({"aliases": ("a", "a")}, ["aliases", "twice"]),
        ({"former_names": ("Old",)}, ["former_names", "'Old'"]),
        ({"former_names": ("a",), "aliases": ("a",)}, ["former_names", "twice"]),
        ({"default_tag": "in22k"}, ["default_tag", "'in22k'", "in1k"]),
        ({"params": -1}, ["params"]),
        ({"reference_commit": "abc"}, ["reference_commit", "reference_code"]),
    ],
)
def test_model_card_rules(changes, words):
    with pytest.raises(ValueError) as error:
        ModelCard(**(MODEL | {"weights": {"in1k": WeightsCard(**HUB)}} | changes))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tag": "In-1k"}, ["tag", "'In-1k'"]),
        ({"where": "a drive"}, ["2 places", "repo_id, where", "exactly one"]),
        ({"repo_id": None, "filename": None}, ["0 places", "exactly one"]),
        ({"package_file": "demo/x.safetensors"}, ["2 places"]),
        ({"filename": None}, ["repo_id and filename belong together"]),
        ({"repo_id": "justaname"}, ["repo_id", "organisation/repository"]),
        ({"revision": "main"}, ["revision", "'main'", "40 hexadecimal digits", "never a branch"]),
        ({"revision": "A" * 40}, ["revision"]),
        ({"sha256": "abc"}, ["sha256", "64"]),
        ({"sha256": "A" * 64}, ["sha256", "lower-case"]),
        ({"filename": "../x"}, ["filename", "'..'"]),
        ({"filename": "/x"}, ["filename", "relative"]),
        ({"filename": "a\\b"}, ["filename"]),
        ({"companions": {"tokenizer": ("a.json",)}}, ["companions", "organisation/repository"]),
        ({"companions": {"org/a": ("../a.json",)}}, ["companions['org/a']", "'..'"]),
        ({"size": 0}, ["size", "positive"]),
        ({"num_classes": -1}, ["num_classes"]),
        ({"shard_sha256": {"a": "b" * 64}}, ["shard_sha256", "no index"]),
        ({"filename": "m.index.json", "shard_sha256": {"a": "b"}}, ["shard_sha256['a']", "64"]),
    ],
)
def test_weights_card_rules(changes, words):
    with pytest.raises(ValueError) as error:
        WeightsCard(**(HUB | changes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_revision_and_where_alone():
    with pytest.raises(ValueError, match="revision is given without repo_id"):
        WeightsCard(tag="x", where="a drive", revision="a" * 40)
    with pytest.raises(ValueError, match="where is empty"):
        WeightsCard(tag="x", where=" ")


def test_tag_of_key_and_card_must_agree():
    with pytest.raises(ValueError, match="weights\\['other'\\] has tag 'in1k'"):
        ModelCard(**MODEL, weights={"other": WeightsCard(**HUB)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.toy_big", ["not TOML"]),
        ("[model.toy_big]\nsystem='x'", ["unknown table [model]", "[models.NAME]"]),
        ("[defaults]\nsystem='toy'", ["no [models.NAME]"]),
        ("[models]\ntoy = 3", ["models.toy", "expected a table"]),
        (FILE + "colour = 'red'\n", ["toy_big", "colour"]),
        (FILE + "params = 'many'\n", ["toy_big", "params", "int"]),
        (FILE + "name = 'other'\n", ["toy_big", "leave the name out"]),
        (FILE + "[models.toy_big.weights.a]\nwhere='x'\nsize='1'\n", ["toy_big", "weights 'a'", "size", "int"]),
        (FILE + "[models.toy_big.weights.a]\nfilename='x'\n", ["toy_big", "weights 'a'", "0 places"]),
        (FILE.replace('"torch"', '"zip"'), ["toy_small", "weights 'in1k'", "format"]),
        (FILE.replace('builder = "toys.models:Toy"', ""), ["toy_small", "builder"]),
        (FILE.replace("[models.toy_big]", "[models.Toy_big]"), ["Toy_big", "name"]),
    ],
)
def test_errors_in_files_name_file_model_and_field(tmp_path, text, words):
    file = tmp_path / "family.toml"
    file.write_text(text)
    with pytest.raises(CardError) as error:
        read_cards(file)
    assert isinstance(error.value, ValueError)
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


def test_one_name_in_two_files_names_both(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = make_package(tmp_path, "zoo_twice", **{"cards__b.toml": FILE})
    with pytest.raises(CardError, match=r"b\.toml|toy\.toml") as error:
        load_cards(name)
    assert "toy.toml" in str(error.value)
    assert "b.toml" in str(error.value)


def test_missing_packages_folders_and_files_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LocalFileMissing, match="no import package 'zoo_nowhere'"):
        load_cards("zoo_nowhere")
    empty = make_package(tmp_path, "zoo_empty", text="")
    with pytest.raises(LocalFileMissing, match="no card files"):
        load_cards(empty)


def test_package_path_and_labels(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = make_package(
        tmp_path, "zoo_labels", **{"demo__digits.txt": "zero\none\n", "labels__two.txt": "a\nb\n", "demo__w.bin": "x"}
    )
    weights = {
        "file": WeightsCard(tag="file", package_file="demo/w.bin", labels="demo/digits.txt", num_classes=2),
        "named": WeightsCard(tag="named", package_file="demo/w.bin", labels="two"),
        "elsewhere": WeightsCard(tag="elsewhere", package_file="demo/w.bin", labels="imagenet-1k"),
        "none": WeightsCard(tag="none", package_file="demo/w.bin"),
        "wrong": WeightsCard(tag="wrong", package_file="demo/w.bin", labels="two", num_classes=3),
    }
    card = ModelCard(**MODEL, weights=weights, package=name)
    assert package_path(card, "demo/w.bin") == tmp_path / name / "demo" / "w.bin"
    assert read_labels(card, weights["file"]) == ("zero", "one")
    assert read_labels(card, weights["named"]) == ("a", "b")
    assert read_labels(card, weights["elsewhere"]) is None
    assert read_labels(card, weights["none"]) is None
    with pytest.raises(CardError, match="2 labels, the card says num_classes = 3"):
        read_labels(card, weights["wrong"])
    with pytest.raises(LocalFileMissing, match="should hold 'demo/absent'"):
        package_path(card, "demo/absent")
    with pytest.raises(LocalFileMissing, match="leads out of the package"):
        package_path(card, "../secret")


def test_a_card_without_package_finds_files_by_its_builder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = make_package(tmp_path, "zoo_by_builder", **{"x.txt": "x"})
    card = ModelCard(**(MODEL | {"builder": f"{name}.models:Toy"}))
    assert package_path(card, "x.txt").read_text() == "x"


names = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
values = st.recursive(
    st.integers(-(2**53), 2**53)
    | st.booleans()
    | st.text(st.characters(codec="ascii", exclude_characters="\x7f"), max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    name=names,
    tag=st.from_regex(r"[a-z0-9][a-z0-9_]{0,9}", fullmatch=True),
    config=st.dictionaries(names, values, max_size=4),
)
def test_cards_survive_json(name, tag, config):
    card = ModelCard(
        **(MODEL | {"name": name, "config": config}),
        weights={tag: WeightsCard(tag=tag, repo_id="org/repo", filename="x", revision="0" * 40, sha256="f" * 64)},
    )
    assert msgspec.json.decode(msgspec.json.encode(card), type=ModelCard) == card
    assert msgspec.convert(msgspec.to_builtins(card), ModelCard) == card


@given(text=st.text(max_size=12))
def test_only_valid_names_make_cards(text):
    valid = text.isascii() and text[:1].isalpha() and text.replace("_", "a").isalnum() and text == text.lower()
    if valid:
        assert ModelCard(**(MODEL | {"name": text})).name == text
    else:
        with pytest.raises(ValueError):
            ModelCard(**(MODEL | {"name": text}))


@given(revision=st.text("0123456789abcdefg", min_size=38, max_size=42))
def test_only_commit_hashes_pin(revision):
    if len(revision) == 40 and "g" not in revision:
        assert WeightsCard(**(HUB | {"revision": revision})).revision == revision
    else:
        with pytest.raises(ValueError, match="revision"):
            WeightsCard(**(HUB | {"revision": revision}))


def test_the_example_in_the_docstring_is_valid():
    from zoo_registry import cards

    example = cards.__doc__.split("::\n", 1)[1].split("\nA card that breaks")[0]
    data = tomllib.loads("\n".join(line[4:] for line in example.splitlines()))
    assert set(data) == {"defaults", "weights_defaults", "models"}
