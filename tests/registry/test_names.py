"""Names: reading, looking up, and the answers to mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zoo_registry import HubRepo, LocalPath, ModelName, WeightsCard, natural_sorted, parse, resolve
from zoo_registry.errors import (
    BadFilter,
    BadName,
    LocalFileMissing,
    RenamedModelWarning,
    UnknownModel,
    UnknownSystem,
    UnknownTag,
    UnknownTask,
)
from zoo_registry.names import KNOWN_DOMAINS, adapter_for, matches, natural_key, nearest, pipeline_for
from zoo_registry.query import query


@pytest.fixture
def zoo(plugins, plugin, card):
    def hub(tag, **more):
        return WeightsCard(tag=tag, repo_id="org/repo", filename="x", **more)

    cards = [
        card(
            "vmamba_tiny",
            system="vmamba",
            domain="vision",
            params=30,
            weights={
                "in1k": hub("in1k", licence="mit"),
                "drive": WeightsCard(tag="drive", where="a drive", licence="cc-by-nc-4.0"),
                "demo": WeightsCard(tag="demo", package_file="demo/x", licence="apache-2.0"),
            },
            default_tag="in1k",
            aliases=("vmamba_t",),
            former_names=("vm_tiny",),
        ),
        card("vmamba_small", system="vmamba", domain="vision", params=50, weights={"in1k": hub("in1k", licence="MIT")}),
        card("mamba_1400m", system="mamba", domain="language", task="text-generation", params=1400),
        card("mamba_130m", system="mamba", domain="language", task="text-generation", licence_code="apache-2.0"),
    ]
    plugins.register(
        plugin(
            "vision",
            zoo_models=cards,
            zoo_adapters={"vmamba": "a.b:C"},
            zoo_pipelines={"image-classification": "a.b:P"},
        )
    )
    return plugins


# -- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vim_tiny", ModelName("vim_tiny")),
        (" vim_tiny ", ModelName("vim_tiny")),
        ("vim_tiny.in1k", ModelName("vim_tiny", "in1k")),
        ("hf-hub:org/repo", HubRepo("org/repo")),
        ("hf-hub:org/vim_tiny.in1k@v1", HubRepo("org/vim_tiny.in1k", "v1")),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected
    assert parse(parse(text)) == expected
    assert parse(str(expected)) == expected


def test_parse_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "x.pth").touch()
    for text in ("./folder", f"{tmp_path}/folder", "local:folder", "local-dir:folder", "./folder/"):
        assert parse(text) == LocalPath(Path(text.removeprefix("local:").removeprefix("local-dir:"))), text
        assert parse(text).is_folder
    assert not parse("./x.pth").is_folder
    assert parse(Path("x.pth")) == LocalPath(Path("x.pth"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/x.pth").path == tmp_path / "x.pth"


@pytest.mark.parametrize("text", ["org/repo", "folder/file.pth", "a\\b", "vision/vim_tiny"])
def test_a_slash_alone_is_refused_with_both_spellings(text):
    with pytest.raises(BadName) as error:
        parse(text)
    assert isinstance(error.value, ValueError)
    assert f"./{text}" in str(error.value)
    assert f"hf-hub:{text}" in str(error.value)


@pytest.mark.parametrize("text", ["hf-hub:", "hf-hub:repo", "hf-hub:a/b/c", "hf-hub:a/b@"])
def test_bad_hub_sources(text):
    with pytest.raises(BadName, match="ORGANISATION/REPOSITORY@REVISION"):
        parse(text)


def test_missing_local_paths_say_what_is_missing(tmp_path):
    with pytest.raises(LocalFileMissing, match="no-such does not exist") as error:
        parse(f"{tmp_path}/no-such/deeper/x.pth")
    assert isinstance(error.value, FileNotFoundError)


def test_a_file_of_that_name_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("My-Model.pth").touch()
    with pytest.raises(BadName, match=r"write \./My-Model\.pth"):
        parse("My-Model.pth")


@given(st.text(max_size=30))
@example("~\\")  # the home of a user that does not exist
def test_parse_never_fails_in_another_way(text):
    try:
        parse(text)
    except (BadName, LocalFileMissing):
        pass
    except (OSError, ValueError) as error:  # the file system's own limits: NUL characters, names of 300 bytes
        assert "\0" in text or "too long" in str(error)  # noqa: PT017


# -- looking up


def test_resolve(zoo):
    assert resolve("vmamba_tiny", plugins=zoo).name == "vmamba_tiny.in1k"
    assert resolve("vmamba_tiny.drive", plugins=zoo).weights.where == "a drive"
    assert resolve("mamba_130m", plugins=zoo).weights is None
    assert str(resolve("mamba_130m", plugins=zoo)) == "mamba_130m"


def test_aliases_are_names_and_former_names_warn(zoo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("vmamba_t.demo", plugins=zoo).name == "vmamba_tiny.demo"
    with pytest.warns(RenamedModelWarning, match="'vm_tiny' is called 'vmamba_tiny' now"):
        assert resolve("vm_tiny.demo", plugins=zoo).name == "vmamba_tiny.demo"
    with pytest.raises(UnknownModel, match=r"nearest: vmamba_t\.in1k"):
        resolve("vmanba_t", plugins=zoo)


def test_unknown_model(zoo):
    with pytest.raises(UnknownModel) as error:
        resolve("vmamba_tinny", plugins=zoo)
    assert isinstance(error.value, KeyError)
    text = str(error.value)
    assert text.startswith("no model 'vmamba_tinny'; nearest: vmamba_tiny.in1k")
    assert "`zoo list 'vmamba*'`" in text
    assert error.value.nearest[0] == "vmamba_tiny.in1k"


@pytest.mark.parametrize("wrong", ["VMamba_Tiny", "vmamba-tiny", "vmamba.tiny", "vmambatiny", "vmamba_tniy.in1k"])
def test_nearest_name_comes_first(zoo, wrong):
    with pytest.raises(UnknownModel) as error:
        resolve(wrong, plugins=zoo)
    assert error.value.nearest[0] == "vmamba_tiny.in1k"


def test_a_folder_of_that_name_is_pointed_out(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    with pytest.raises(UnknownModel, match=r"\./trained, with \./ in front, is the file or folder"):
        resolve("trained", plugins=zoo)
    with pytest.raises(UnknownModel) as error:
        resolve("untrained", plugins=zoo)
    assert "./" not in str(error.value)


def test_wrong_tag_lists_the_tags(zoo):
    with pytest.raises(UnknownTag) as error:
        resolve("vmamba_tiny.in22k", plugins=zoo)
    lines = str(error.value).splitlines()
    assert "no tag 'in22k'" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "vmamba_tiny.in1k (default)",
        "vmamba_tiny.drive",
        "vmamba_tiny.demo",
    ]
    assert "on the Hub (org/repo)" in lines[1]
    assert "checkpoint=" in lines[2]
    assert error.value.tags == ("in1k", "drive", "demo")
    with pytest.raises(UnknownTag, match="no published weights"):
        resolve("mamba_130m.pile", plugins=zoo)


def test_domain_of_a_missing_plugin_is_named(zoo):
    with pytest.raises(UnknownModel, match="plugin for domain medical is not installed: pip install ssm-zoo-medical"):
        resolve("umamba_bot_3d", plugins=zoo)
    with pytest.raises(UnknownModel, match="pip install ssm-zoo-point-cloud"):
        resolve("pointmamba", plugins=zoo)
    # the language plugin is here, so its names get no hint
    with pytest.raises(UnknownModel) as error:
        resolve("mamba_999m", plugins=zoo)
    assert "not installed" not in str(error.value)


def test_a_name_like_nothing_lists_the_missing_plugins(zoo):
    with pytest.raises(UnknownModel, match=r"plugins not installed: .*medical"):
        resolve("qqqqqqqq", plugins=zoo)


def test_empty_zoo(plugins):
    with pytest.raises(UnknownModel, match="no model is installed"):
        resolve("vim_tiny", plugins=plugins)
    assert query(plugins=plugins) == []


def test_resolve_takes_names_only(zoo):
    with pytest.raises(BadName, match=r"expected 'arch' or 'arch\.tag'"):
        resolve("hf-hub:a/b", plugins=zoo)


def test_adapters_and_pipelines(zoo):
    assert adapter_for("vmamba", plugins=zoo) == "a.b:C"
    assert pipeline_for("image-classification", plugins=zoo) == "a.b:P"
    with pytest.raises(UnknownSystem, match="nearest: vmamba") as error:
        adapter_for("vmanba", plugins=zoo)
    assert isinstance(error.value, KeyError)
    with pytest.raises(UnknownSystem, match="ssm-zoo-medical"):
        adapter_for("segmamba", plugins=zoo)
    with pytest.raises(UnknownTask, match="nearest: image-classification"):
        pipeline_for("image_classification", plugins=zoo)


def test_known_domains_name_each_system_once():
    systems = [s for d in KNOWN_DOMAINS.values() for s in d.systems]
    assert len(systems) == len(set(systems))


# -- patterns, order, filters


def found(zoo, *args, **filters):
    return [r.name for r in query(*args, plugins=zoo, **filters)]


def test_query_everything_in_natural_order(zoo):
    assert found(zoo) == [
        "mamba_130m",
        "mamba_1400m",
        "vmamba_small.in1k",
        "vmamba_tiny.demo",
        "vmamba_tiny.drive",
        "vmamba_tiny.in1k",
    ]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"domain": "language"}, ["mamba_130m", "mamba_1400m"]),
        ({"task": "text-generation"}, ["mamba_130m", "mamba_1400m"]),
        ({"system": "vmamba", "pretrained": False}, ["vmamba_tiny.drive"]),
        ({"pretrained": True}, ["vmamba_small.in1k", "vmamba_tiny.demo", "vmamba_tiny.in1k"]),
        ({"on_hub": True}, ["vmamba_small.in1k", "vmamba_tiny.in1k"]),
        ({"on_hub": False, "domain": "vision"}, ["vmamba_tiny.demo", "vmamba_tiny.drive"]),
        ({"licence": "mit"}, ["vmamba_small.in1k", "vmamba_tiny.in1k"]),
        ({"licence": "cc-*"}, ["vmamba_tiny.drive"]),
        ({"licence": "apache-2.0"}, ["mamba_130m", "vmamba_tiny.demo"]),
        ({"min_params": 50}, ["mamba_1400m", "vmamba_small.in1k"]),
        ({"max_params": 50, "on_hub": True}, ["vmamba_small.in1k", "vmamba_tiny.in1k"]),
        ({"plugin": "vision", "domain": "language"}, ["mamba_130m", "mamba_1400m"]),
        ({"exclude": ["vmamba*", "*1400m"]}, ["mamba_130m"]),
        ({"exclude": "*.in1k", "on_hub": True}, []),
    ],
)
def test_filters(zoo, filters, expected):
    assert found(zoo, **filters) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("v*mamba*tiny*", ["vmamba_tiny.demo", "vmamba_tiny.drive", "vmamba_tiny.in1k"]),
        ("*.in1k", ["vmamba_small.in1k", "vmamba_tiny.in1k"]),
        ("vmamba_tiny.d*", ["vmamba_tiny.demo", "vmamba_tiny.drive"]),
        ("vision/*small*", ["vmamba_small.in1k"]),
        ("language/", ["mamba_130m", "mamba_1400m"]),
        ("language/vmamba*", []),
        (["*130m", "*small"], ["mamba_130m", "vmamba_small.in1k"]),
        ("mamba", []),
        ("vmamba_t.in1k", ["vmamba_tiny.in1k"]),
        ("vm_tiny", []),
        ("vmamba_[st]*.in1k", ["vmamba_small.in1k", "vmamba_tiny.in1k"]),
    ],
)
def test_patterns(zoo, pattern, expected):
    assert found(zoo, pattern) == expected


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"domain": "visoin"}, ["domain 'visoin'", "nearest: vision", "known: language, vision"]),
        ({"domain": "medical"}, ["pip install ssm-zoo-medical"]),
        ({"task": "segmentation"}, ["task 'segmentation'", "image-classification"]),
        ({"system": "vmanba"}, ["nearest: vmamba"]),
        ({"plugin": "other"}, ["plugin 'other'"]),
        ({"min_params": 5, "max_params": 4}, ["min_params 5"]),
    ],
)
def test_filters_that_nothing_can_match(zoo, filters, words):
    with pytest.raises(BadFilter) as error:
        query(plugins=zoo, **filters)
    assert isinstance(error.value, ValueError)
    assert all(word in str(error.value) for word in words), str(error.value)


@given(st.lists(st.from_regex(r"[a-z]{1,3}[0-9]{0,4}[a-z]{0,2}", fullmatch=True), max_size=8))
def test_natural_order_is_an_order(names):
    once = natural_sorted(names)
    assert natural_sorted(reversed(once)) == once
    assert sorted(once) == sorted(names)


def test_natural_order_compares_numbers():
    assert natural_sorted(["s10", "s2", "s", "s2_l8", "t1"]) == ["s", "s2", "s2_l8", "s10", "t1"]
    assert natural_key("a10b") > natural_key("a9b")


@given(st.from_regex(r"[a-z][a-z0-9_]{2,15}", fullmatch=True))
def test_a_name_is_nearest_to_itself(name):
    assert nearest(name.upper(), ["something_else", name, "vim"])[0] == name


def test_matches_is_case_sensitive(card):
    assert matches("toy*", card("toy_small"), None)
    assert not matches("TOY*", card("toy_small"), None)
