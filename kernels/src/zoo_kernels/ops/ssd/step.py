"""One decoding step of the scan with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._ops import Operator


def _fake(x, dt, A, B, C, D, z, dt_bias, dt_scale, state, dt_softplus, low, high, *, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype):
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for heads, headdim, groups, size in ((4, 12, 2, 16), (3, 5, 1, 7)):
        yield (
            r(2, heads, headdim), r(2, heads), -torch.rand(heads, device=device), r(2, groups, size), r(2, groups,
            size), r(heads), r(2, heads, headdim), r(heads), None, torch.randn(2, heads, headdim, size, device=device),
            True, 0.0, float("inf"),
        )  # fmt: skip


_step = Operator(
    "ssd_step",
    package=__package__,
    arguments=(
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? dt_scale, "
        "Tensor state, bool dt_softplus, float low, float high"
    ),
    outputs=("y",),
    mutates=("state",),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    state: Tensor,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    dt_scale: Tensor | None = None,
) -> Tensor:
    """One step of :func:`zoo_kernels.ssd`; ``state`` (batch, heads, headdim, state) is updated in place.

    x, z: (batch, heads, headdim); dt, dt_scale: (batch, heads); A, dt_bias: (heads,); B, C: (batch, groups, state) or
    (batch, state); D: (heads,) or (heads, headdim). Returns y: (batch, heads, headdim), x's dtype.
    Raises ValueError as :func:`zoo_kernels.ssd`. Source: as there; ``selective_state_update`` in the original.
    """
    from . import check_ssd

    if not _fits(x, dt, A, B, C, D, z, dt_bias, dt_scale, state):
        _checks.has_shape("ssd_step", "x", x, [("batch", None), ("heads", None), ("headdim", None)])
        _checks.is_tensor("ssd_step", "state", state, x)
        B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
        one = [None if t is None else t[:, None] for t in (x, dt, B, C, z, dt_scale)]
        check_ssd("ssd_step", one[0], one[1], A, one[2], one[3], D, one[4], dt_bias, one[5], state)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if low > high:
        raise ValueError(f"ssd_step: dt_limit is {tuple(dt_limit)}; the first must not exceed the second")
    y: Tensor = _step(x, dt, A, B, C, D, z, dt_bias, dt_scale, state, bool(dt_softplus), low, high)
    return y


def _fits(x, dt, A, B, C, D, z, dt_bias, dt_scale, state) -> bool:
    """Whether plain tensors of one dtype and device fit together: the usual call, found out in a microsecond or two."""
    try:
        batch, heads, headdim = x.shape
        _, groups, size = B.shape
        kind, device = x.dtype, x.device
        return (
            dt.shape == (batch, heads)
            and A.shape == (heads,)
            and B.shape == C.shape == (batch, groups, size)
            and state.shape == (batch, heads, headdim, size)
            and heads % groups == 0
            and (D is None or D.shape in ((heads,), (heads, headdim)))
            and (z is None or z.shape == x.shape)
            and (dt_bias is None or dt_bias.shape == (heads,))
            and (dt_scale is None or dt_scale.shape == dt.shape)
            and kind in _checks.FLOATS
            and all(
                t is None or (t.dtype == kind and t.device == device)
                for t in (dt, A, B, C, D, z, dt_bias, dt_scale, state)
            )
        )
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return False  # the full checks say what is wrong
