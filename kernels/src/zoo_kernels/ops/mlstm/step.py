"""One decoding step of the mLSTM with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._ops import Operator


def _fake(q, k, v, i, f, C, n, m, scale, eps, *, save):
    return (torch.empty_like(v, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype):
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for heads, headdim, size in ((4, 12, 16), (3, 5, 7)):
        state = [torch.randn(*s, device=device) for s in ((2, heads, headdim, size), (2, heads, size), (2, heads))]
        gates = (3 * r(2, heads), 3 * r(2, heads))
        yield r(2, heads, size), r(2, heads, size), r(2, heads, headdim), *gates, *state, size**-0.5, 1e-6


_step = Operator(
    "mlstm_step",
    package=__package__,
    arguments=(
        "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, Tensor m, float scale, float eps"
    ),
    outputs=("y",),
    mutates=("C", "n", "m"),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


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
    v's dtype. No gradients: the state changes in place. Raises ValueError as :func:`zoo_kernels.mlstm`.
    """
    from . import check

    rows = [t[:, None] if isinstance(t, Tensor) else t for t in (q, k, v, i, f)]
    check("mlstm_step", *[*rows, state])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    y: Tensor = _step(q, k, v, i, f, *state, scale, float(eps))
    return y
