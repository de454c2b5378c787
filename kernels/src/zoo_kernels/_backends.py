"""Which implementation serves a call: reference, native (C++ on a CPU), triton, or export.

The choice is automatic and per device: on a CPU ``native``, elsewhere ``triton``, and ``reference`` where those cannot
serve. Being passed over is said once per operator and reason, on the logger ``zoo_kernels`` at level WARNING. It can be
forced::

    zoo_kernels.backend("reference")            # from here on
    with zoo_kernels.backend("native"): ...     # inside the block
    ZOO_KERNELS=reference python ...            # for the process

A forced back end that cannot serve a call raises :class:`BackendError` with the reason. ``export`` is the operator
written as ordinary torch operators; it is taken inside ``torch.onnx.export`` and when forced. A tracer writes
recurrences as loops (:mod:`zoo_kernels._loop`); outside of one the scans have a form without a loop, others their
definition.
The setting is process-wide, as torch's own ``torch.backends`` flags are.
"""

from __future__ import annotations

import logging
import os
from types import TracebackType

import torch

NAMES = ("reference", "native", "triton", "export")
AUTOMATIC = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
log = logging.getLogger("zoo_kernels")


class BackendError(RuntimeError):
    """A back end that was asked for by name cannot serve the call; the message says why and what can."""


def _valid(name: str | None, where: str) -> str:
    if name is None or name in ("", "auto"):
        return ""
    if name not in NAMES:
        raise ValueError(f"{where} is {name!r}; expected one of {', '.join(NAMES)}, or 'auto'")
    return name


_forced = _valid(os.environ.get("ZOO_KERNELS"), "the environment variable ZOO_KERNELS")
_told: set[tuple[str, str, str]] = set()


class backend:
    """Force a back end by name (``"auto"`` or None: choose again), at once; as a context manager, until its end."""

    def __init__(self, name: str | None) -> None:
        global _forced
        name = _valid(name, "backend")
        self.before, self.name = _forced, name
        _forced = name

    def __enter__(self) -> backend:
        global _forced
        _forced = self.name  # a context object may be entered again later
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self.before

    def __repr__(self) -> str:
        return f"zoo_kernels.backend({self.name or 'auto'!r})"


def forced() -> str:
    """The name of the forced back end, or ''."""
    return _forced


def exporting() -> bool:
    """Whether operators are to be written out as plain torch operators."""
    return _forced == "export" or (_forced == "" and torch.onnx.is_in_onnx_export())


def passed_over(operator: str, name: str, reason: str) -> None:
    """Say once that ``operator`` does not run on back end ``name``."""
    key = (operator, name, reason)
    if key not in _told:
        _told.add(key)
        log.warning("%s: the %s back end is passed over: %s", operator, name, reason)
