"""Loading the native CPU library (``libzoo_kernels``): plain C ABI, through ctypes."""

from __future__ import annotations

from typing import Any


def unavailable() -> str | None:
    return "the native library is not built yet"


def describe() -> dict[str, Any]:
    return {"available": False, "reason": unavailable()}
