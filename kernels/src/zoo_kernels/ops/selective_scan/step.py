"""One decoding step of the selective scan, the state updated in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._ops import Operator

NAME = "selective_scan_step"


def _fake(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus, *, save):
    return (torch.empty_like(u, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype):
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for groups, N, channels in ((1, 16, 24), (2, 3, 10)):
        yield (
            r(2, channels), r(2, channels), -torch.rand(channels, N, device=device), r(2, groups, N), r(2, groups, N),
            r(channels), r(2, channels), r(channels),
            torch.randn(2, channels, N, device=device, dtype=checks.state_dtype(dtype)), True,
        )  # fmt: skip


_step = Operator(
    NAME,
    package=__package__,
    arguments=(
        "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor state, "
        "bool dt_softplus"
    ),
    outputs=("y",),
    mutates=("state",),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


_FITTING: set[tuple[Any, ...]] = set()  # signatures that have passed the checks


def step(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus) -> Tensor:
    """See :func:`zoo_kernels.selective_scan_step`."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, state)
    signature = checks.signature(*tensors)
    if signature is None or signature not in _FITTING:
        _check(*tensors)
        checks.remember(_FITTING, signature)
    if B.dim() == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    result: Any = _step(u, dt, A, B, C, D, z, dt_bias, state, bool(dt_softplus))
    return result


def _check(u, dt, A, B, C, D, z, dt_bias, state) -> None:
    """Raise ValueError unless these fit together."""
    checks.has_shape(NAME, "u", u, [("batch", None), ("channels", None)])
    batch, channels = u.shape
    checks.has_shape(NAME, "A", A, [("channels", channels), ("state", None)], u)
    N = A.shape[1]
    wide: list[tuple[str, int | None]] = [("batch", batch), ("channels", channels)]
    for name, value in (("dt", dt), ("z", z)):
        if value is not None or name == "dt":
            checks.has_shape(NAME, name, value, wide, u)
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            checks.has_shape(NAME, name, value, [("channels", channels)], u)
    checks.has_shape(NAME, "state", state, [*wide, ("state", N)], u)
    checks.has_dtype(NAME, "state", state, (torch.float32, torch.float64, torch.complex64, torch.complex128))
    for name, value in (("B", B), ("C", C)):
        checks.is_tensor(NAME, name, value, u)
        grouped = value.dim() == 3
        axes: list[tuple[str, int | None]] = [("groups", value.shape[1])] if grouped else []
        checks.has_shape(NAME, name, value, [("batch", batch), *axes, ("state", N)], u)
        if grouped and (value.shape[1] == 0 or channels % value.shape[1]):
            raise ValueError(f"{NAME}: {name} has {value.shape[1]} groups; they must divide the {channels} channels")
    if B.shape[:-1] != C.shape[:-1]:
        raise ValueError(f"{NAME}: C has shape {tuple(C.shape)}; it must be {tuple(B.shape)}, as B is")
