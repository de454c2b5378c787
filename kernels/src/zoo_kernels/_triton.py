"""Whether Triton can be used here."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can be compiled here, or None. Does not touch a device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation must cost Triton only
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


def describe() -> dict[str, Any]:
    reason = unavailable()
    if reason is not None:
        return {"available": False, "reason": reason}
    import triton

    return {"available": True, "version": triton.__version__}
