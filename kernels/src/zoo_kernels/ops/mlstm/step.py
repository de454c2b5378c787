"""One decoding step of the mLSTM with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _backends, _checks, _native


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One step of :func:`zoo_kernels.mlstm`; the tensors of ``state`` (C, n, m) are updated in place.

    q, k: (batch, heads, state); v: (batch, heads, headdim); i, f: (batch, heads). Returns y: (batch, heads, headdim),
    v's dtype. Raises ValueError as :func:`zoo_kernels.mlstm`.
    """
    from . import check
    from .reference import mlstm_reference

    q, k, v, i, f = (t[:, None] for t in (q, k, v, i, f))
    check("mlstm_step", q, k, v, i, f, state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    native = (
        _native.missing("mlstm_step") is None
        and _backends.forced() in ("", "native")
        and not torch.compiler.is_compiling()
        and _native.wrong_dtypes("qkvif", (q, k, v, i, f)) is None
        and all(t.is_contiguous() and t.dtype == _checks.state_dtype(v.dtype) for t in state)
    )
    if native:
        return _native_step(q, k, v, i, f, state, scale, eps)
    with torch.no_grad():
        y, new = mlstm_reference(q, k, v, i, f, scale, eps, state, None, None)
        for kept, value in zip(state, new, strict=True):
            kept.copy_(value)
    return y[:, 0]


def _native_step(q, k, v, i, f, state, scale: float, eps: float) -> Tensor:
    """kernels/native/state_step.cpp; arguments (batch, 1, ...)."""
    from zoo_kernels.ops.ssd.step_native import bits

    work = state[0].dtype
    batch, _, heads, headdim = v.shape
    tensors = [t.detach().to(work).contiguous() for t in (q, k, v, i, f)]
    y = torch.empty(batch, heads, headdim, dtype=work)
    _native.function("mlstm_step")(
        batch, heads, headdim, q.shape[3], _native.threads(), int(work == torch.float64), bits(scale), bits(eps),
        *(t.data_ptr() for t in (*tensors, *state)), y.data_ptr(),
    )  # fmt: skip
    return y.to(v.dtype)
