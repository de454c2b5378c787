"""``import zoo`` and ``zoo list`` stay light; every public name resolves."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

HEAVY = ("torch", "timm", "transformers", "torchvision", "numpy", "huggingface_hub", "rich", "safetensors", "click")


def modules_after(code: str, env=None) -> set[str]:
    script = f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_loads_nothing_heavy():
    assert not modules_after("import zoo") & {*HEAVY, "zoo_registry", "zoo_vision", "pluggy", "msgspec"}


def test_listing_loads_no_torch():
    found = modules_after("from zoo.cli import run; assert run(['list']) == 0")
    assert not found & {"torch", "timm", "numpy", "huggingface_hub", "transformers", "rich"}
    assert "zoo_registry" in found


def test_info_loads_no_torch(toys):
    assert not modules_after("import zoo; zoo.list(); zoo.errors.UnknownModel") & {"torch", "timm", "huggingface_hub"}


@pytest.mark.parametrize("name", zoo.__all__)
def test_public_names_resolve(name):
    assert getattr(zoo, name) is not None


def test_name_tables_agree():
    assert {*zoo._NAMES, "__version__"} == set(zoo.__all__)
    tree = ast.parse(Path(zoo.__file__).read_text())
    typed = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    static = {alias.asname or alias.name for node in typed.body for alias in node.names}
    assert static == set(zoo._NAMES)


def test_reference_is_callable_however_it_is_imported():
    from zoo.reference import ReferenceAdapter, adapter

    assert zoo.reference.ReferenceAdapter is ReferenceAdapter
    assert callable(zoo.reference)
    with pytest.raises(zoo.errors.UnknownSystem):
        zoo.reference("no_such_system")
    with pytest.raises(zoo.errors.UnknownSystem):
        adapter("no_such_system")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        zoo.lod  # noqa: B018
