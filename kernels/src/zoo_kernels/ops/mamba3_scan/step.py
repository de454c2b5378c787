"""One decoding step of Mamba-3's recurrence with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._ops import Operator


def _fake(
    x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, theta, h, last_K, last_x, halves,
    contract, *, save,
):  # fmt: skip
    batch, heads, headdim = x.shape
    return (x.new_empty((batch, heads, headdim) if contract else (batch, B.shape[1], heads, headdim)),)


def _cases(device: torch.device, dtype: torch.dtype):
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def state(ranks: int) -> list[Tensor]:
        return [torch.randn(*s, device=device) for s in ((2, 4, 3), (2, 4, 12, 8), (2, ranks, 4, 8), (2, 4, 12))]

    def head(ranks: int) -> list[Tensor]:
        rates = (r(2, 4).abs(), -r(2, 4).abs())
        return [r(2, 4, 12), *rates, r(2, ranks, 2, 8), r(2, ranks, 2, 8), r(2, 4), r(2, 3)]

    yield *head(1), r(4), r(2, 4, 12), r(4, 1, 8), r(4, 1, 8), None, None, None, *state(1), False, True
    yield *head(1), None, None, None, None, None, None, None, *state(1), True, True
    rank = [r(4, 3, 8), r(4, 3, 8), r(4, 3, 12)]
    yield *head(3), r(4), r(2, 4, 12), *rank, r(4, 3, 12), r(4, 3, 12), *state(3), True, True
    yield *head(3), r(4), None, *rank, None, None, *state(3), True, False


_step = Operator(
    "mamba3_step",
    package=__package__,
    arguments=(
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor trap, Tensor angles, Tensor? D, Tensor? z, "
        "Tensor? B_bias, Tensor? C_bias, Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor theta, Tensor h, "
        "Tensor last_K, Tensor last_x, bool halves, bool contract"
    ),
    outputs=("y",),
    mutates=("theta", "h", "last_K", "last_x"),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


def mamba3_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    rotate_halves: bool | None = None,
) -> Tensor:
    """One step of :func:`zoo_kernels.mamba3_scan`; the four tensors of ``state`` are updated in place.

    Arguments and result as there without the axis of length. No gradients: the state changes in place. Raises
    ValueError as there.
    """
    from . import check, check_gate

    mimo = isinstance(B, Tensor) and B.dim() == 4
    halves = mimo if rotate_halves is None else rotate_halves
    rows = [t[:, None] if isinstance(t, Tensor) else t for t in (x, dt, A, B, C, trap, angles)]
    check("mamba3_step", *[*rows, D, B_bias, C_bias, mimo_x, state, halves])
    batch, heads, headdim = x.shape
    if z is not None:
        _checks.has_shape("mamba3_step", "z", z, [("batch", batch), ("heads", heads), ("headdim", headdim)], x)
    if mimo:
        check_gate("mamba3_step", z, mimo_z, mimo_o)
        for label, t in (("mimo_z", mimo_z), ("mimo_o", mimo_o)):
            if t is not None:
                axes = [("heads", heads), ("ranks", B.shape[1]), ("headdim", headdim)]
                _checks.has_shape("mamba3_step", label, t, axes, x)
    else:
        B, C, mimo_z, mimo_o = B[:, None], C[:, None], None, None
    y: Tensor = _step(
        x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, *state, bool(halves),
        not mimo or mimo_o is not None,
    )  # fmt: skip
    return y
