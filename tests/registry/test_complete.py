"""Nothing of the registry's surface is without a test: hooks, environment variables, exceptions, imports."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zoo_registry
from zoo_registry import errors
from zoo_registry.hookspecs import Hooks

HERE = Path(__file__).parent
SOURCE = Path(zoo_registry.__file__).parent
TESTS = {p.name: p.read_text() for p in HERE.glob("test_*.py") if p.name != Path(__file__).name}

#: Exception -> the builtins that it is, besides ZooError.
BUILTINS = {
    "UnknownModel": KeyError,
    "UnknownTag": KeyError,
    "UnknownSystem": KeyError,
    "UnknownTask": KeyError,
    "BadName": ValueError,
    "BadFilter": ValueError,
    "CardError": ValueError,
    "PluginError": ImportError,
    "PluginApiMismatch": ImportError,
    "DuplicateName": ValueError,
    "MissingExtra": ImportError,
    "StoreError": OSError,
    "NoWeights": FileNotFoundError,
    "NotOnHub": FileNotFoundError,
    "LocalFileMissing": FileNotFoundError,
    "RepoNotFound": FileNotFoundError,
    "RevisionNotFound": FileNotFoundError,
    "FileNotInRepo": FileNotFoundError,
    "AccessDenied": PermissionError,
    "RepoHidden": (FileNotFoundError, PermissionError),
    "HubUnavailable": ConnectionError,
    "HubTimeout": (ConnectionError, TimeoutError),
    "NotCached": FileNotFoundError,
    "IncompleteDownload": ConnectionError,
    "HashMismatch": ValueError,
    "DiskFull": OSError,
    "CacheReadOnly": PermissionError,
    "UnsafeFile": ValueError,
    "BadCheckpoint": ValueError,
    "BadFile": ValueError,
    "FormatTooNew": ValueError,
    "BadArgument": (TypeError, ValueError),
    "NotExportable": RuntimeError,
    "KeysDoNotMatch": KeyError,
}
#: Raised by the library above this one; their behaviour is tested there.
RAISED_ABOVE = {"UnsafeFile", "FormatTooNew", "BadArgument", "BadFile", "NotExportable"}

classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
exceptions = [c for c in classes if issubclass(c, errors.ZooError) and c is not errors.ZooError]
warnings = [c for c in classes if issubclass(c, errors.ZooWarning) and c is not errors.ZooWarning]


def test_the_table_is_complete():
    assert {c.__name__ for c in exceptions} == set(BUILTINS)


@pytest.mark.parametrize("kind", exceptions, ids=lambda c: c.__name__)
def test_an_exception_is_a_builtin_prints_its_message_and_can_be_pickled(kind):
    builtins = BUILTINS[kind.__name__]
    for builtin in builtins if isinstance(builtins, tuple) else (builtins,):
        assert issubclass(kind, builtin)
    error = kind("what to do: 'this'", path="/x", name="n")
    assert str(error) == "what to do: 'this'"
    assert (error.path, error.name) == ("/x", "n")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path) == (kind, str(error), "/x")
    assert kind.__doc__
    assert kind.exit_code in range(2, 8)


@pytest.mark.parametrize("kind", exceptions + warnings, ids=lambda c: c.__name__)
def test_an_exception_is_raised_in_a_test(kind):
    name = kind.__name__
    if name not in RAISED_ABOVE:
        pattern = rf"(raises|warns)\(\(?[^)]*\b{name}\b|\"{name}\""
        assert any(re.search(pattern, text) for text in TESTS.values()), f"no test makes {name} happen"


@pytest.mark.parametrize("hook", [name for name in vars(Hooks) if name.startswith("zoo_")])
def test_a_hook_has_a_test(hook):
    assert re.search(rf"\b{hook}\b", TESTS["test_manager.py"])


def test_environment_variables_have_tests_and_are_documented():
    used = set(re.findall(r"\bZOO_[A-Z_]+\b", "\n".join(p.read_text() for p in SOURCE.glob("*.py"))))
    used -= {"ZOO_PLUGIN_API"}
    assert used == {"ZOO_PLUGINS", "ZOO_DISABLE_PLUGINS"}
    readme = (SOURCE.parents[1] / "README.md").read_text()
    for name in used:
        assert any(name in text for text in TESTS.values())
        assert name in readme


def test_import_needs_neither_torch_nor_the_hub():
    code = (
        "import sys, zoo_registry, zoo_registry.store, zoo_registry.cache; zoo_registry.query(); "
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'httpx2', 'httpx', 'timm'}; "
        "bad = {m.partition('.')[0] for m in sys.modules} & heavy; "
        "print(sorted(bad), [str(b) for b in zoo_registry.manager().broken])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_everything_exported_exists():
    assert all(hasattr(zoo_registry, name) for name in zoo_registry.__all__)
