"""Libraries that only some uses need: imported where they are used, or missed with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import MissingExtra


def optional(module: str, what: str, requirement: str, *, otherwise: str = "") -> ModuleType:
    """Import ``module``, which ``what`` needs ("reading DICOM").

    requirement: what pip installs it with, "ssm-zoo-medical[dicom]". otherwise: what else can be done, for the end of
    the message. Raises MissingExtra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        command = f"pip install '{requirement}'" if "[" in requirement else f"pip install {requirement}"
        other = f" ({otherwise})" if otherwise else ""
        extra = requirement.partition("[")[2].rstrip("]") or requirement
        name = module.partition(".")[0]
        raise MissingExtra(f"{what} needs {name}: {command}{other}", extra=extra, command=command) from error
