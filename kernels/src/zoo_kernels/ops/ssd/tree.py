"""The scan over a tree of tokens: every node continues the state of its parent (STree)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_kernels import _checks


def tree_mask(parents: Tensor) -> Tensor:
    """Ancestor-or-self mask (..., nodes, nodes) bool of ``parents`` (..., nodes): the parent's index, -1 at a root.

    Nodes stand in topological order: a parent before its children. Raises ValueError where one does not.
    """
    if not isinstance(parents, Tensor) or parents.dim() == 0 or parents.dtype not in _checks.INTEGERS:
        raise ValueError("tree_mask: parents must be an integer tensor (..., nodes)")
    n = parents.shape[-1]
    index = torch.arange(n, device=parents.device)
    if bool(((parents >= index) | (parents < -1)).any()):
        raise ValueError("tree_mask: parents must be -1 or the index of an earlier node")
    mask = torch.eye(n, dtype=torch.bool, device=parents.device).expand(*parents.shape, n).clone()
    for i in range(1, n):  # the row of a node is the row of its parent and itself
        parent = parents[..., i].long()
        row = mask.gather(-2, parent.clamp(min=0)[..., None, None].expand(*parent.shape, 1, n))[..., 0, :]
        mask[..., i, :] |= row & (parent >= 0)[..., None]
    return mask


def ancestor_windows(mask: Tensor, width: int) -> Tensor:
    """The last ``width`` ancestors-or-self of each node, oldest first, -1 on the left where there are fewer.

    mask: (batch, nodes, nodes), ancestor-or-self. Returns (batch, nodes, width) int64.
    """
    n = mask.shape[-1]
    index = torch.arange(n, device=mask.device)
    marked = torch.where(mask.bool(), index, index.new_full((), -1))
    ranked = marked.sort(dim=-1).values  # ancestors come last, in increasing order
    return F.pad(ranked, (max(width - n, 0), 0), value=-1)[..., -width:]


def causal_conv1d_tree(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Tensor, state: Tensor, activation: str | None = None
) -> Tensor:
    """Depthwise convolution along the path from the root to each node.

    x: (batch, nodes, channels); weight: (channels, width); mask: (batch, nodes, nodes), ancestor-or-self;
    state: (batch, width, channels): the last rows before the root, newest last (as :func:`zoo_kernels.causal_conv1d`
    leaves it), not modified. Returns y like x. Source: STree, arXiv 2505.14969, ``tree_mask_conv1d``.
    """
    batch, _nodes, channels = x.shape
    width = weight.shape[1]
    if tuple(state.shape) != (batch, width, channels):
        raise ValueError(
            f"causal_conv1d_tree: state has shape {tuple(state.shape)}; it must be {(batch, width, channels)}"
        )
    padded = F.pad(mask.bool(), (width, 0), value=True)  # the rows of the state are ancestors of every node
    window = ancestor_windows(F.pad(padded, (0, 0, width, 0)), width)[:, width:]  # (batch, nodes, width)
    work = torch.promote_types(x.dtype, torch.float32)
    rows = torch.cat([state.to(work), x.to(work)], dim=1)
    picked = rows[torch.arange(batch, device=x.device)[:, None, None], window]  # (batch, nodes, width, channels)
    y = (picked * weight.t().to(work)).sum(2)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    elif activation is not None:
        raise ValueError(f"causal_conv1d_tree: activation is {activation!r}; expected None or 'silu'")
    return y.to(x.dtype)


def ssd_tree(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    mask: Tensor,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    return_node_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`zoo_kernels.ssd` down a tree: the state of a node continues that of its parent.

    With d as there and ``a_i`` the sum of ``d_j * A`` over j on the path from the root to i::

        y_i = exp(a_i) S0 C_i + sum over ancestors-or-self j of exp(a_i - a_j) (C_i . B_j) d_j x_j + D * x_i

    x, z: (batch, nodes, heads, headdim); dt: (batch, nodes, heads); A, dt_bias: (heads,);
    B, C: (batch, nodes, groups, state); D: (heads,) or (heads, headdim); initial_state S0: (batch, heads, headdim,
    state), not modified; mask: (batch, nodes, nodes) or (nodes, nodes), ancestor-or-self, see :func:`tree_mask`.
    Returns ``(y, states)``; states (batch, nodes, heads, headdim, state) if asked for, else None (they are never
    needed for y). A tree that is a chain gives the ordinary scan. Source: STree, arXiv 2505.14969, section 3;
    ``tree_scan.py``.
    """
    from . import check_ssd, discretise, gate

    B, C = check_ssd("ssd_tree", x, dt, A, B, C, D, z, dt_bias, None, initial_state)
    batch, nodes, heads, _ = x.shape
    _checks.is_tensor("ssd_tree", "mask", mask, x)
    if mask.dim() == 2:
        mask = mask[None].expand(batch, -1, -1)
    _checks.has_shape("ssd_tree", "mask", mask, [("batch", batch), ("nodes", nodes), ("nodes", nodes)], x)
    on = mask.bool()
    d = discretise(dt, None, dt_bias, dt_softplus, dt_limit, x.dtype)
    work = d.dtype
    a = torch.einsum("bij,bjh->bih", on.to(work), d * A.to(work))  # sums along paths, not along the sequence
    # masked before the exponential: between branches the difference may be large and positive
    M = (a[:, :, None] - a[:, None]).masked_fill(~on[..., None], -torch.inf).exp()  # (batch, i, j, heads)
    repeat = heads // B.shape[2]
    b, c = (t.to(work).repeat_interleave(repeat, dim=2) for t in (B, C))
    u = d[..., None] * x.to(work)
    y = torch.einsum("bijh,bjhp->bihp", torch.einsum("bihn,bjhn->bijh", c, b) * M, u)
    if initial_state is not None:
        y = y + torch.exp(a)[..., None] * torch.einsum("bihn,bhpn->bihp", c, initial_state.to(work))
    if D is not None:
        y = y + (D.to(work)[:, None] if D.dim() == 1 else D.to(work)) * x.to(work)
    states = None
    if return_node_states:
        states = torch.einsum("bijh,bjhp,bjhn->bihpn", M, u, b)
        if initial_state is not None:
            states = states + torch.exp(a)[..., None, None] * initial_state.to(work)[:, None]
    y = y.to(x.dtype)
    return (y if z is None else gate(y, z)), states


def ssd_replay(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None = None,
    *,
    accepted: Tensor,
    initial_state: Tensor,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """The state after the accepted nodes of a tree: the recurrence over them in order, the others left out.

    Arguments as in :func:`ssd_tree`; accepted: (batch, nodes), non-zero on the accepted path (a row of the mask).
    Returns the new state (batch, heads, headdim, state). One state is kept whatever the size of the tree.
    Source: STree, arXiv 2505.14969, activation replay.
    """
    from . import check_ssd, discretise
    from .core import decayed_scan

    B, _ = check_ssd("ssd_replay", x, dt, A, B, B, None, None, dt_bias, None, initial_state)
    _checks.has_shape("ssd_replay", "accepted", accepted, [("batch", x.shape[0]), ("nodes", x.shape[1])], x)
    kept = accepted.bool()[..., None]
    d = discretise(dt, None, dt_bias, dt_softplus, dt_limit, x.dtype).masked_fill(~kept, 0)
    _, final = decayed_scan(x.masked_fill(~kept[..., None], 0), d * A.to(d.dtype), d, B, B, None, initial_state)
    return final
