"""One decoding step of linear attention with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._ops import Operator


def _fake(v, decay, k, q, state, normalizer, scale, strict, eps, *, save):
    return (torch.empty_like(v, memory_format=torch.contiguous_format),)


def _cases(device: torch.device, dtype: torch.dtype):
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def wide(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device) + 1

    for decay, sums in ((None, None), (-wide(1, 4, 1), wide(2, 4, 7)), (-wide(2, 4, 1), None), (-wide(2, 4, 7), None)):
        yield r(2, 4, 12), decay, r(2, 2, 7), r(2, 2, 7), wide(2, 4, 12, 7), sums, 0.5, decay is None, 1e-6
    yield (
        r(1, 2, 5),
        -wide(1, 2, 16),
        r(1, 1, 16).abs(),
        r(1, 1, 16).abs(),
        wide(1, 2, 5, 16),
        wide(1, 2, 16),
        1.0,
        True,
        0.1,
    )


_step = Operator(
    "linear_attention_step",
    package=__package__,
    arguments=(
        "Tensor v, Tensor? decay, Tensor k, Tensor q, Tensor state, Tensor? normalizer, float scale, bool strict, "
        "float eps"
    ),
    outputs=("y",),
    mutates=("state", "normalizer"),
    backends={"reference": ".step_reference", "native": ".step_native", "triton": ".step_gpu"},
    fake=_fake,
    cases=_cases,
)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor,
    normalizer: Tensor | None = None,
    scale: float = 1.0,
    strict: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """One step of :func:`zoo_kernels.linear_attention`; ``state`` (and ``normalizer``) are updated in place.

    q, k: (batch, groups, state); v: (batch, heads, headdim); decay: None, (heads,), (batch, heads) or (batch, heads,
    state), logarithms as there;
    state: (batch, heads, headdim, state); normalizer: (batch, heads, state), given exactly when the whole form
    normalises; both float32 (float64 if v is).
    Returns y: (batch, heads, headdim), v's dtype. No gradients: the state changes in place. Raises ValueError naming
    the argument and what it must be. Source: as :func:`zoo_kernels.linear_attention`.
    """
    name = "linear_attention_step"
    _checks.has_shape(name, "v", v, [("batch", None), ("heads", None), ("headdim", None)])
    _checks.has_dtype(name, "v", v)
    batch, heads, headdim = v.shape
    _checks.has_shape(name, "k", k, [("batch", batch), ("groups", None), ("state", None)], v)
    groups, size = k.shape[1:]
    _checks.has_shape(name, "q", q, [("batch", batch), ("groups", groups), ("state", size)], v)
    for label, t in (("k", k), ("q", q)):
        _checks.has_dtype(name, label, t)
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: k has {groups} groups; it must be a divisor of the {heads} heads of v")
    axes = [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", size)]
    _checks.has_shape(name, "state", state, axes, v)
    _checks.has_dtype(name, "state", state)
    if normalizer is not None:
        _checks.has_shape(name, "normalizer", normalizer, [axes[0], axes[1], axes[3]], v)
    if decay is not None:
        _checks.is_tensor(name, "decay", decay, v)
        _checks.has_dtype(name, "decay", decay)
        wanted = {1: [axes[1]], 2: axes[:2]}.get(decay.dim(), [axes[0], axes[1], axes[3]])
        _checks.has_shape(name, "decay", decay, wanted, v)
        decay = decay[None, :, None] if decay.dim() == 1 else decay[..., None] if decay.dim() == 2 else decay
    y: Tensor = _step(v, decay, k, q, state, normalizer, float(scale), bool(strict), float(eps))
    return y
