"""Recipes of plugins as modules: ``recipe("graph", "broadcast")`` is plugins/graph/recipes/broadcast.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def recipe(plugin: str, name: str) -> ModuleType:
    """The module, under a name of its own: several plugins have recipes of one name. What it imports from beside it is
    its own copy, too."""
    folder = ROOT / "plugins" / plugin / "recipes"
    own = f"recipe_{plugin}_{name}"
    spec = importlib.util.spec_from_file_location(own, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # its data classes look themselves up there
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for beside in folder.glob("*.py"):
            found = sys.modules.get(beside.stem)
            if found is not None and found.__file__ == str(beside):
                del sys.modules[beside.stem]
    return module
