"""zoo: every published state-space model by name, with the original's weights and the original's numbers.

>>> import zoo
>>> model = zoo.load("vim_tiny.in1k")                  # fetch, verify, convert, build, eval()
>>> zoo.list("v*mamba*", domain="vision", pretrained=True)
>>> answer = zoo.pipeline("vim_tiny.in1k")("cat.jpg")  # raw input to answer

Importing this package imports neither torch nor any plugin: each public name is fetched from its module when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> (module, attribute); attribute None: the name is the module itself.
_NAMES: dict[str, tuple[str, str | None]] = {
    "load": ("zoo.loading", "load"),
    "create": ("zoo.building", "create"),
    "list": ("zoo.catalog", "list_models"),
    "info": ("zoo.catalog", "info"),
    "download": ("zoo.catalog", "download"),
    "pipeline": ("zoo.pipelines", "pipeline"),
    "Pipeline": ("zoo.pipelines", "Pipeline"),
    "Result": ("zoo.results", "Result"),
    "validate": ("zoo.validation", "validate"),
    "Measured": ("zoo.validation", "Measured"),
    "save": ("zoo.saving", "save"),
    "push": ("zoo.publishing", "push"),
    "convert": ("zoo.conversion", "convert"),
    "export": ("zoo.exporting", "export"),
    "from_reference": ("zoo.conversion", "from_reference"),
    # The module is callable: zoo.reference("vim") is the adapter, zoo.reference.Golden the class.
    "reference": ("zoo.reference", None),
    "ReferenceAdapter": ("zoo.reference", "ReferenceAdapter"),
    "Rules": ("zoo.rules", "Rules"),
    "rules": ("zoo.rules", None),
    "errors": ("zoo_registry.errors", None),
    "layers": ("zoo.layers", None),
    "testing": ("zoo.testing", None),
}

if TYPE_CHECKING:
    from zoo_registry import errors

    from . import layers, rules, testing
    from .building import create
    from .catalog import download, info
    from .catalog import list_models as list
    from .conversion import convert, from_reference
    from .exporting import export
    from .loading import load
    from .pipelines import Pipeline, pipeline
    from .publishing import push
    from .reference import ReferenceAdapter
    from .reference import adapter as reference
    from .results import Result
    from .rules import Rules
    from .saving import save
    from .validation import Measured, validate

__all__ = [
    "Measured",
    "Pipeline",
    "ReferenceAdapter",
    "Result",
    "Rules",
    "__version__",
    "convert",
    "create",
    "download",
    "errors",
    "export",
    "from_reference",
    "info",
    "layers",
    "list",
    "load",
    "pipeline",
    "push",
    "reference",
    "rules",
    "save",
    "testing",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    value = import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # type: ignore[valid-type]
    return sorted({*globals(), *_NAMES})
