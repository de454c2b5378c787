"""The recurrence under ``ssd``, ``linear_attention``, ``mlstm`` and ``mamba3_scan``, and its registration.

``h_t = exp(a_t) h_{t-1} + w_t v_t k_t^T``, ``y_t = h_t q_t + D v_t``: one scalar decay and one input weight per head
and step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels._checks import state_dtype
from zoo_kernels._ops import Operator


def _fake(v, decay, weight, k, q, D, state, resets, order, strict, *, save):
    final = v.new_empty(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=state_dtype(v.dtype))
    return torch.empty_like(v, memory_format=torch.contiguous_format), final


def _cases(device, dtype):
    def rand(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    decay = -torch.rand(2, 150, 4, device=device)
    weight = torch.rand(2, 150, 4, device=device)
    resets = torch.rand(2, 150, device=device) < 0.05
    order = torch.randperm(150, device=device)[None, :141].contiguous()
    state = torch.randn(2, 4, 20, 12, device=device)
    v, k, q = rand(2, 150, 4, 20), rand(2, 150, 2, 12), rand(2, 150, 2, 12)
    yield v, decay, weight, k, q, rand(4), state, None, None, False
    yield v, decay, weight, k, q, rand(4, 20), None, resets, order, False
    yield v, None, None, k, q, None, None, None, None, True


scan = Operator(
    "ssd_core",
    package=__package__,
    arguments=(
        "Tensor v, Tensor? decay, Tensor? weight, Tensor k, Tensor q, Tensor? D, Tensor? state, Tensor? resets, "
        "Tensor? order, bool strict"
    ),
    outputs=("y", "final"),
    differentiable=("v", "decay", "weight", "k", "q", "D", "state"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu", "export": ".export"},
    fake=_fake,
    cases=_cases,
)


def decayed_scan(
    v: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    k: Tensor,
    q: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    order: Tensor | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Checked arguments in, ``(y, last state)`` out; shapes as in :func:`zoo_kernels.ops.ssd.reference.forward`."""
    if scan.exporting():
        from .export import forward

        return forward(v, decay, weight, k, q, D, state, resets, order, strict)
    y, final = scan(v, decay, weight, k, q, D, state, resets, order, strict)
    return y, final
