"""The plugin manager, with plugins in memory and with throw-away distributions on disk."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from zoo_registry import Manager, WeightsCard, hookimpl, manager
from zoo_registry.errors import BrokenPluginWarning, DuplicateName, PluginApiMismatch, PluginError, UnknownModel
from zoo_registry.hookspecs import API_VERSION, Hooks
from zoo_registry.manager import SUPPORTED_API, installed_plugins, reset
from zoo_registry.names import domain_hint, resolve

# -- plugins in memory


def test_every_hook_reaches_the_registry(plugins, plugin, card):
    module = plugin(
        "toys",
        zoo_models=[card("toy_small"), card("toy_big")],
        zoo_adapters={"toy": "toys.reference:ToyAdapter"},
        zoo_pipelines={"image-classification": "toys.pipelines:Classify"},
        zoo_validators={"toy-counting": "toys.models:measure"},
        zoo_paths={"spiral": "toys.paths:spiral"},
        zoo_commands={"toys": "toys.cli:main"},
        zoo_demos=[{"model": "toy_small", "file": "demo/x.png", "picture": "yes"}],
    )
    loaded = plugins.register(module)
    assert loaded.domains == ("toys",)
    assert list(plugins.models()) == ["toy_small", "toy_big"]
    assert plugins.models()["toy_small"].plugin == "toys"
    assert plugins.adapters() == {"toy": "toys.reference:ToyAdapter"}
    assert plugins.pipelines() == {"image-classification": "toys.pipelines:Classify"}
    assert plugins.validators() == {"toy-counting": "toys.models:measure"}
    assert plugins.paths() == {"spiral": "toys.paths:spiral"}
    assert plugins.commands() == {"toys": "toys.cli:main"}
    assert plugins.demos() == [(loaded, {"model": "toy_small", "file": "demo/x.png", "picture": "yes"})]
    plugins.unregister(module)
    assert plugins.models() == plugins.adapters() == plugins.pipelines() == plugins.validators() == {}
    assert plugins.paths() == plugins.commands() == {}
    assert plugins.demos() == plugins.plugins == []


def test_every_hook_is_optional(plugins, plugin):
    assert plugins.register(plugin("empty")).models == ()


def test_an_object_can_be_a_plugin(plugins, card):
    class Toys:
        ZOO_PLUGIN_API = 1

        @hookimpl
        def zoo_models(self):
            yield card("toy_small")

    plugins.register(Toys(), name="notebook")
    assert [p.name for p in plugins.plugins] == ["notebook"]


def test_unregister_of_a_stranger(plugins, plugin):
    with pytest.raises(ValueError, match="not a registered plugin"):
        plugins.unregister(plugin("toys"))


def test_the_same_plugin_twice(plugins, plugin):
    module = plugin("toys")
    plugins.register(module)
    with pytest.raises(PluginError, match="registered twice"):
        plugins.register(module)
    assert len(plugins.plugins) == 1
    plugins.unregister(module)


@pytest.mark.parametrize(
    ("api", "words"),
    [
        (None, ["must set ZOO_PLUGIN_API", f"ZOO_PLUGIN_API = {API_VERSION}"]),
        ("1", ["must set ZOO_PLUGIN_API", "'1'"]),
        (True, ["must set ZOO_PLUGIN_API"]),
        (API_VERSION + 1, ["upgrade the registry", "pip install -U ssm-zoo-registry"]),
        (SUPPORTED_API[0] - 1, ["upgrade the plugin", "pip install -U old"]),
    ],
)
def test_api_version(plugins, plugin, api, words):
    with pytest.raises(PluginApiMismatch) as error:
        plugins.register(plugin("old", api=api))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert plugins.plugins == []


def _raises():
    raise RuntimeError("no cards today\nsecond line")


def _raises_late():
    yield from ()
    raise RuntimeError("no cards today")


def _wrong_signature(models):
    return []


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"zoo_models": _raises}, ["zoo_models", "RuntimeError: no cards today"]),
        ({"zoo_models": _raises_late}, ["zoo_models", "RuntimeError: no cards today"]),
        ({"zoo_models": _wrong_signature}, ["zoo_models", "models"]),
        ({"zoo_modells": lambda: []}, ["unknown hook", "zoo_modells"]),
        ({"zoo_models": lambda: "toy_small"}, ["zoo_models answered str", "ModelCard"]),
        ({"zoo_models": lambda: 3}, ["zoo_models answered int"]),
        ({"zoo_models": lambda: [{"name": "toy"}]}, ["zoo_models yields dict"]),
        ({"zoo_adapters": lambda: ["toy"]}, ["zoo_adapters answered list", "mapping"]),
        ({"zoo_pipelines": lambda: {"task": print}}, ["zoo_pipelines maps 'task'", "import string"]),
        ({"zoo_paths": lambda: {"spiral": "toys.paths.spiral"}}, ["zoo_paths maps 'spiral'", "package.module:name"]),
        ({"zoo_commands": lambda: {3: "a:b"}}, ["zoo_commands maps 3"]),
        ({"zoo_demos": lambda: {"model": "toy"}}, ["zoo_demos answered dict"]),
        ({"zoo_demos": lambda: [{"model": "toy"}]}, ["zoo_demos holds", "'model' and 'file'"]),
    ],
)
def test_bad_hooks_are_refused_and_leave_no_trace(plugins, plugin, card, hooks, words):
    plugins.register(plugin("good", zoo_models=[card("toy_small")]))
    with pytest.raises(PluginError) as error:
        plugins.register(plugin("bad", **hooks))
    assert isinstance(error.value, ImportError)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert [p.name for p in plugins.plugins] == ["good"]
    plugins.register(plugin("later", zoo_models=[card("toy_later")]))
    assert list(plugins.models()) == ["toy_small", "toy_later"]


def test_one_plugin_claiming_a_name_twice(plugins, plugin, card):
    with pytest.raises(PluginError, match="claims the model name 'toy_small' twice"):
        plugins.register(plugin("toys", zoo_models=[card("toy_small"), card("toy_big", aliases=("toy_small",))]))


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"zoo_models": "toy"}, {"zoo_models": "toy"}, "model name 'toy'"),
        ({"zoo_models": "toy"}, {"zoo_models": "other:toy"}, "model name 'toy'"),
        ({"zoo_adapters": {"s": "a:b"}}, {"zoo_adapters": {"s": "c:d"}}, "system 's'"),
        ({"zoo_pipelines": {"t": "a:b"}}, {"zoo_pipelines": {"t": "c:d"}}, "task 't'"),
        ({"zoo_paths": {"p": "a:b"}}, {"zoo_paths": {"p": "c:d"}}, "scan path 'p'"),
        ({"zoo_validators": {"t": "a:b"}}, {"zoo_validators": {"t": "c:d"}}, "validator of task 't'"),
        ({"zoo_commands": {"v": "a:b"}}, {"zoo_commands": {"v": "c:d"}}, "command 'v'"),
    ],
)
def test_two_plugins_claiming_one_name(plugins, plugin, card, first, second, what):
    def hooks(given):
        (hook, value), *_ = given.items()
        if hook == "zoo_models":
            name, _, alias = value.partition(":")
            value = [card(name, aliases=(alias,) if alias else ())]
        return {hook: value}

    plugins.register(plugin("ours", **hooks(first)))
    with pytest.raises(DuplicateName) as error:
        plugins.register(plugin("theirs", **hooks(second)))
    assert isinstance(error.value, ValueError)
    assert all(word in str(error.value) for word in [what, "ours", "theirs", "ZOO_DISABLE_PLUGINS"]), str(error.value)
    assert set(error.value.distributions) == {"ours", "theirs"}
    assert [p.name for p in plugins.plugins] == ["ours"]  # the second was not added
    plugins.check()


# -- distributions on disk

GOOD = """
from zoo_registry import ModelCard, hookimpl
ZOO_PLUGIN_API = 1

@hookimpl
def zoo_models():
    return [ModelCard(name={name!r}, system="toy", domain={domain!r}, task="a-task", builder="x.y:Z")]
"""


def install(
    folder: Path, module: str, source: str, *, entry: str, distribution: str | None = None, version: str = "1.2.3"
) -> str:
    """A distribution as pip would leave it: a module, and metadata with an entry point."""
    distribution = distribution or f"ssm-zoo-{entry}"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[zoo.plugins]\n{entry} = {module}\n\n[console_scripts]\nx = y:z\n")
    (info / "RECORD").write_text("")
    return module


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path; only its distributions count as installed."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def fresh(**env: str) -> Manager:
        entries = [e for e in installed_plugins() if list(tmp_path.glob(f"{e.distribution.replace('-', '_')}-*"))]
        return Manager(entries, env=env)

    yield tmp_path, fresh
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_listing_imports_nothing(site):
    folder, _ = site
    install(folder, "zoo_plug_never", "raise SystemExit('imported')", entry="never")
    found = {e.name: e for e in installed_plugins()}["never"]
    assert (found.value, found.distribution, found.version) == ("zoo_plug_never", "ssm-zoo-never", "1.2.3")
    assert "zoo_plug_never" not in sys.modules


def test_damaged_metadata_of_others_does_no_harm(site):
    folder, fresh = site
    install(folder, "zoo_plug_ok", GOOD.format(name="toy_ok", domain="toys"), entry="toys")
    for name, text in (("no_metadata", None), ("bad_entries", "[zoo.plugins\nx = = y\n\x00"), ("empty", "")):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        if text is not None:
            (info / "entry_points.txt").write_text(text)
    (folder / "nameless-1.0.dist-info").mkdir()
    (folder / "nameless-1.0.dist-info" / "entry_points.txt").write_text("[zoo.plugins]\nnameless = zoo_plug_ok\n")
    assert [e.name for e in installed_plugins() if e.value == "zoo_plug_ok"] in (["nameless", "toys"], ["toys"])
    assert list(fresh().models()) == ["toy_ok"]


@pytest.mark.parametrize(
    ("project", "found"),
    [
        (
            '[project]\nname = "ssm-zoo-x"\nversion = "7"\n[project.entry-points."zoo.plugins"]\nx = "zoo_x.plugin"\n',
            True,
        ),
        ('[project]\nname = "zoo.plugins"\n', False),
        ("[project\nzoo.plugins", False),
        ('[project]\nname = "other"\n', False),
        (None, False),
    ],
)
def test_a_source_folder_on_the_path_counts_as_installed(tmp_path, monkeypatch, project, found):
    source = tmp_path / "src"
    source.mkdir()
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.syspath_prepend(source)
    entries = [e for e in installed_plugins() if e.name == "x"]
    assert [(e.value, e.distribution, e.version) for e in entries] == [("zoo_x.plugin", "ssm-zoo-x", "7")] * found


def test_an_installed_distribution_and_its_source_folder_are_one_plugin(site):
    folder, _ = site
    install(folder, "zoo_plug_dev", GOOD.format(name="toy_dev", domain="toys"), entry="dev", version="1.0")
    source = folder / "src"
    source.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "ssm_zoo.dev"\nversion = "2"\n[project.entry-points."zoo.plugins"]\ndev = "zoo_plug_dev"\n'
    )
    sys.path.insert(0, str(source))
    try:
        (entry,) = (e for e in installed_plugins() if e.name == "dev")
    finally:
        sys.path.remove(str(source))
    assert entry.version == "1.0"


def test_a_good_distribution(site):
    folder, fresh = site
    install(folder, "zoo_plug_good", GOOD.format(name="toy_good", domain="toys"), entry="toys")
    zoo = fresh()
    (loaded,) = zoo.plugins
    assert (loaded.name, loaded.distribution, loaded.version) == ("toys", "ssm-zoo-toys", "1.2.3")
    assert zoo.models()["toy_good"].plugin == "ssm-zoo-toys"
    assert zoo.broken == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import zoo_no_such_library\n", ["ModuleNotFoundError", "zoo_plug_bad.py:1 (import zoo_no"]),
        ("x = (\n", ["SyntaxError"]),
        ("raise ValueError('first line\\nsecond line')\n", ["ValueError: first line", "zoo_plug_bad.py:1"]),
        ("import sys\nsys.exit('good bye')\n", ["SystemExit: good bye"]),
        (GOOD.format(name="x", domain="d").replace("API = 1", "API = 99"), ["hook API 99", "upgrade the registry"]),
        (GOOD.format(name="x", domain="d").replace("API = 1", "API = 0"), ["hook API 0", "pip install -U ssm-zoo-bad"]),
        (GOOD.format(name="x", domain="d").replace("ZOO_PLUGIN_API = 1", ""), ["must set ZOO_PLUGIN_API"]),
        (GOOD.format(name="X Y", domain="d"), ["zoo_models raised", "name is 'X Y'"]),
        (GOOD.format(name="x", domain="d").replace("zoo_models()", "zoo_models(x)"), ["zoo_models", "hook API"]),
        (GOOD.format(name="x", domain="d").replace("return", "1 / 0; return"), ["zoo_models raised ZeroDivisionError"]),
    ],
)
def test_a_broken_distribution_is_named_and_left_out(site, source, words):
    folder, fresh = site
    install(folder, "zoo_plug_bad", source, entry="bad", version="4.5.6")
    install(folder, "zoo_plug_fine", GOOD.format(name="toy_fine", domain="toys"), entry="toys")
    zoo = fresh()
    with pytest.warns(BrokenPluginWarning) as caught:
        assert list(zoo.models()) == ["toy_fine"]
    (broken,) = zoo.broken
    text = str(broken)
    assert text == str(caught[0].message)
    for word in ["'bad'", "ssm-zoo-bad 4.5.6", "zoo_plug_bad", "ZOO_DISABLE_PLUGINS=bad", *words]:
        assert word in text, text
    assert "second line" not in text
    assert isinstance(broken.error, BaseException)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.models()  # said once


def test_a_broken_domain_is_named_when_a_name_is_missed(site):
    folder, fresh = site
    install(folder, "zoo_plug_med", "import zoo_no_such_library", entry="medical")
    zoo = fresh()
    with pytest.warns(BrokenPluginWarning), pytest.raises(UnknownModel, match="is installed and broken"):
        resolve("umamba_bot", plugins=zoo)


def test_two_distributions_claiming_one_name(site):
    folder, fresh = site
    install(folder, "zoo_plug_a", GOOD.format(name="toy_same", domain="a"), entry="a")
    install(folder, "zoo_plug_b", GOOD.format(name="toy_same", domain="b"), entry="b")
    zoo = fresh()
    with pytest.raises(DuplicateName, match="ssm-zoo-a and ssm-zoo-b"):
        zoo.models()
    with pytest.raises(DuplicateName):
        resolve("toy_same", plugins=zoo)
    assert [p.name for p in zoo.plugins] == ["a", "b"]  # so that `zoo plugins` can still show them
    assert zoo.conflicts() == [("model name", "toy_same", ("ssm-zoo-a", "ssm-zoo-b"))]
    assert fresh(ZOO_DISABLE_PLUGINS="ssm-zoo-b").models()["toy_same"].domain == "a"


@pytest.mark.parametrize(
    ("env", "loaded"),
    [
        ({}, ["a", "b", "c"]),
        ({"ZOO_PLUGINS": "a, c"}, ["a", "c"]),
        ({"ZOO_PLUGINS": "ssm_zoo_B"}, ["b"]),
        ({"ZOO_PLUGINS": ""}, []),
        ({"ZOO_DISABLE_PLUGINS": "a"}, ["b", "c"]),
        ({"ZOO_DISABLE_PLUGINS": "ssm-zoo-c,b"}, ["a"]),
        ({"ZOO_DISABLE_PLUGINS": ""}, ["a", "b", "c"]),
        ({"ZOO_PLUGINS": "a,b", "ZOO_DISABLE_PLUGINS": "b"}, ["a"]),
    ],
)
def test_environment_chooses_plugins(site, env, loaded):
    folder, fresh = site
    for name in "abc":
        install(folder, f"zoo_plug_{name}", GOOD.format(name=f"toy_{name}", domain=name), entry=name)
    zoo = fresh(**env)
    assert [p.name for p in zoo.plugins] == loaded
    assert sorted(e.name for e in zoo.disabled) == sorted(set("abc") - set(loaded))


def test_a_disabled_plugin_is_not_imported(site):
    folder, fresh = site
    install(folder, "zoo_plug_off", "raise RuntimeError", entry="medical")
    zoo = fresh(ZOO_DISABLE_PLUGINS="medical")
    assert zoo.plugins == zoo.broken == []
    assert "zoo_plug_off" not in sys.modules
    assert "disabled" in domain_hint("medical", zoo)


@pytest.mark.parametrize("variable", ["ZOO_PLUGINS", "ZOO_DISABLE_PLUGINS"])
def test_environment_with_a_wrong_name_says_so(site, variable):
    folder, fresh = site
    install(folder, "zoo_plug_v", GOOD.format(name="toy_v", domain="v"), entry="vision")
    with pytest.warns(BrokenPluginWarning, match=f"{variable} names 'visoin', which is not installed.*vision"):
        fresh(**{variable: "visoin"}).load()


def test_loading_is_logged_at_debug(site, caplog):
    folder, fresh = site
    install(folder, "zoo_plug_log", GOOD.format(name="toy_log", domain="toys"), entry="toys")
    with caplog.at_level(logging.DEBUG, logger="zoo.plugins"):
        fresh().load()
    assert "loaded plugin toys of ssm-zoo-toys 1.2.3" in caplog.text


def test_the_process_has_one_manager():
    reset()
    assert manager() is manager()
    first = manager()
    reset()
    assert manager() is not first
    reset()


def test_environment_is_read_in_a_real_process(tmp_path):
    install(tmp_path, "zoo_plug_real", GOOD.format(name="toy_real", domain="toys"), entry="toys")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import zoo_registry as r; "
        "print(sorted(r.manager().models())); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"ZOO_PLUGINS": "toys", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["['toy_real']", "False"]


def test_specifications_have_docstrings():
    hooks = [name for name in vars(Hooks) if name.startswith("zoo_")]
    assert hooks
    assert all(getattr(Hooks, name).__doc__ for name in hooks)


def test_a_card_keeps_its_weights_when_the_plugin_is_stamped(plugins, plugin, card):
    weights = {"in1k": WeightsCard(tag="in1k", where="a drive")}
    plugins.register(plugin("toys", zoo_models=[card(weights=weights)]))
    assert plugins.models()["toy_small"].weights == weights
