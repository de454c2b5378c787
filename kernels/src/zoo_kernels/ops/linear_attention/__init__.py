"""Linear attention: a matrix state read by queries, without decay, with one per head, or with one per key channel."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks
from zoo_kernels._checks import state_dtype
from zoo_kernels._loop import traced
from zoo_kernels._ops import Operator
from zoo_kernels.ops._walk import walk_order
from zoo_kernels.ops.ssd.core import decayed_scan

from .step import linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]


def _fake(v, decay, k, q, state, resets, order, strict, *, save):
    final = v.new_empty(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=state_dtype(v.dtype))
    return torch.empty_like(v, memory_format=torch.contiguous_format), final


def _cases(device, dtype):
    def rand(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    decay = -torch.rand(2, 70, 3, 12, device=device)
    v, k, q = rand(2, 70, 3, 20), rand(2, 70, 3, 12), rand(2, 70, 3, 12)
    order = torch.randperm(70, device=device)[None, :61].contiguous()
    yield v, decay, k, q, torch.randn(2, 3, 20, 12, device=device), None, None, False
    yield v, decay, k, q, None, torch.rand(2, 70, device=device) < 0.1, order, True


_gated = Operator(
    "linear_attention_gated",
    package=__name__,
    arguments=("Tensor v, Tensor decay, Tensor k, Tensor q, Tensor? state, Tensor? resets, Tensor? order, bool strict"),
    outputs=("y", "final"),
    differentiable=("v", "decay", "k", "q", "state"),
    backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
    fake=_fake,
    cases=_cases,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    strict: bool = False,
    eps: float = 0.0,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """Linear attention: softmax-free attention as a recurrence over a matrix, linear in length.

    Per head, ``decay`` being the LOG of what multiplies the state (0 keeps it, negative forgets)::

        S_t = S_{t-1} * exp(decay_t) + v_t k_t^T              (headdim, state)
        y_t = scale * S_t q_t                                 (strict: the decayed S_{t-1}, so a step does not read
        itself) n_t = n_{t-1} * exp(decay_t) + k_t,  y_t / (scale * n_t . q_t + eps)       when ``normalize``

    q, k: (batch, length, groups, state), any feature map applied; head h reads group h // (heads / groups)
    v: (batch, length, heads, headdim)
    decay: None, (heads,) constant (RetNet), (batch, length, heads) (Mamba-2, mLSTM) or (batch, length, heads, state),
        one per key channel (GLA)
    path: None, (steps,) or (batch, steps) integer rows in visiting order; reverse: walk from the end
    resets: (batch, length) bool, by row: the state is dropped before the input of that row is added
    lengths: (batch,) int: only the first ``lengths[b]`` steps are walked; rows not visited give 0
    initial_state, final state: S (batch, heads, headdim, state), float32 (float64 if v is); with ``normalize`` the pair
        (S, n), n (batch, heads, state)

    Other normalisers: give v a further channel of ones; its output is ``scale * n_t . q_t``.
    Returns ``(y, final_state)``; y has v's shape and dtype. Raises ValueError naming the argument and what it must be.
    Source: Katharopoulos et al., arXiv 2006.16236, equations 9 to 12; Sun et al. (RetNet), arXiv 2307.08621; Yang et
    al. (GLA), arXiv 2312.06635, section 4.

    Example::

        y, _ = linear_attention(q, k, v, torch.nn.functional.logsigmoid(forget))
    """
    name = "linear_attention"
    _checks.has_shape(name, "v", v, [("batch", None), ("length", None), ("heads", None), ("headdim", None)])
    _checks.has_dtype(name, "v", v)
    batch, length, heads, headdim = v.shape
    rows = [("batch", batch), ("length", length)]
    _checks.has_shape(name, "k", k, [*rows, ("groups", None), ("state", None)], v)
    groups, size = k.shape[2:]
    _checks.has_shape(name, "q", q, [*rows, ("groups", groups), ("state", size)], v)
    for label, t in (("k", k), ("q", q)):
        _checks.has_dtype(name, label, t)
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: k has {groups} groups; it must be a divisor of the {heads} heads of v")
    if decay is not None:
        _checks.is_tensor(name, "decay", decay, v)
        _checks.has_dtype(name, "decay", decay)
        if decay.dim() == 1:
            _checks.has_shape(name, "decay", decay, [("heads", heads)], v)
            decay = decay.expand(batch, length, heads)
        elif decay.dim() == 3:
            _checks.has_shape(name, "decay", decay, [*rows, ("heads", heads)], v)
        else:
            _checks.has_shape(name, "decay", decay, [*rows, ("heads", heads), ("state", size)], v)
    path = _checks.canonical_path(name, path, batch=batch, length=length, paths=None, like=v)
    path = None if path is None else path[:, 0]
    (flag,) = _checks.canonical_reverse(name, reverse, paths=1)
    resets = _checks.canonical_resets(name, resets, batch=batch, length=length, like=v)
    lengths = _checks.canonical_lengths(name, lengths, batch=batch, like=v)
    if not torch.compiler.is_compiling() and all(t is None or type(t) is Tensor for t in (path, lengths)):
        _checks.check_values(name, path, lengths, length=length)
    order = walk_order(path, flag, lengths, batch=batch, length=length, device=v.device)
    state = _joined(name, initial_state, normalize, v, size)
    if normalize:  # the sum of keys is one more row of the state, fed by ones
        v = torch.cat([v, v.new_ones(batch, length, heads, 1)], dim=-1)
    if decay is not None and decay.dim() == 4:
        repeat = heads // groups
        kh, qh = (t if repeat == 1 else t.repeat_interleave(repeat, dim=2) for t in (k, q))
        if _gated.exporting() and traced() and (length if order is None else order.shape[1]) != 0:
            from .export import linear_attention_export

            y, final = linear_attention_export(v, decay, kh, qh, state, resets, order, strict)
        else:
            y, final = _gated(v, decay, kh, qh, state, resets, order, strict)
    else:
        y, final = decayed_scan(v, decay, None, k, q, None, state, resets, order, strict)
    if scale != 1.0:
        y = y * scale
    if normalize:
        total = y[..., headdim:] + eps
        y = y[..., :headdim] / total
        if order is not None:  # a row that is not visited has neither values nor a sum
            y = torch.where(_visited(order, batch, length)[:, :, None, None], y, torch.zeros_like(y))
    if not return_final_state:
        return y, None
    return y, (final[:, :, :headdim], final[:, :, headdim]) if normalize else final


def _visited(order: Tensor, batch: int, length: int) -> Tensor:
    from zoo_kernels.ops._walk import scatter_rows

    return scatter_rows((order >= 0).expand(batch, -1), order, length)


def _joined(name: str, state, normalize: bool, v: Tensor, size: int) -> Tensor | None:
    if state is None:
        return None
    batch, _, heads, headdim = v.shape
    axes = [("batch", batch), ("heads", heads), ("headdim", headdim), ("state", size)]
    if not normalize:
        return _checks.has_shape(name, "initial_state", state, axes, v)
    if not (isinstance(state, tuple | list) and len(state) == 2):
        raise ValueError(f"{name}: initial_state is {type(state).__name__}; with normalize it must be the pair (S, n)")
    _checks.has_shape(name, "initial_state[0]", state[0], axes, v)
    _checks.has_shape(name, "initial_state[1]", state[1], [axes[0], axes[1], axes[3]], v)
    return torch.cat([state[0], state[1][:, :, None]], dim=2)
