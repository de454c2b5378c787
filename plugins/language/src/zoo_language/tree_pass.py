"""One pass of a model over a tree of tokens, and the move of its state over the accepted ones.

A pass leaves the state alone and keeps what a move needs: one state a layer is stored, whatever the size of the tree.
Source: STree, arXiv 2505.14969, section 3; wyc1997/stree @ 021b0ec ``modules/mamba2.py``, ``modules/mha.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.layers import Mamba2
from zoo_kernels.ops.ssd import ancestor_windows, causal_conv1d_tree, ssd_replay, ssd_tree

from ._base import Block, CausalLM, normed
from .attention import MultiHeadAttention, rotary
from .mamba import MambaLM
from .state import LayerState, State
from .tree_verification import Tree

Kept = dict[str, Tensor]


def why_not(model: CausalLM) -> str | None:
    """Why trees cannot be verified with a model in one pass, or None."""
    if not isinstance(model, MambaLM):
        return f"{type(model).__name__} is not a stack of Mamba-2 and attention blocks"
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        if not isinstance(layer.mixer, Mamba2 | MultiHeadAttention):
            return (
                f"the mixer of block {i} is {type(layer.mixer).__name__}; only Mamba-2 and attention have a tree form"
            )
    return None


def mamba2_tree(mixer: Mamba2, u: Tensor, state: LayerState, mask: Tensor) -> tuple[Tensor, Kept]:
    """A Mamba-2 mixer on the nodes of a tree: u (batch, nodes, D), mask (batch, nodes, nodes), to (y like u, kept)."""
    z0, x0, z, xBC, dt = mixer._split(u)
    activation = "silu" if mixer.conv_activation == "silu" else None
    after = causal_conv1d_tree(
        xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mask=mask, state=state["conv"], activation=activation
    )
    x, B, C = mixer._parts(mixer._act(after))
    y, _ = ssd_tree(
        x, dt, -torch.exp(mixer.A_log.float()), B, C, mixer._skip(), dt_bias=mixer.dt_bias.float(), mask=mask,
        dt_softplus=True, dt_limit=mixer.dt_limit, initial_state=state["ssm"],
    )  # fmt: skip
    return mixer._finish(y.flatten(-2), z, z0, x0), {"xBC": xBC, "x": x, "B": B, "dt": dt}


def mamba2_replay(mixer: Mamba2, kept: Kept, state: LayerState, accepted: Tensor) -> None:
    """Move a layer's state over the accepted nodes, (batch, nodes) bool, in place."""
    final = ssd_replay(
        kept["x"], kept["dt"], -torch.exp(mixer.A_log.float()), kept["B"], mixer.dt_bias.float(), accepted=accepted,
        initial_state=state["ssm"], dt_softplus=True, dt_limit=mixer.dt_limit,
    )  # fmt: skip
    state["ssm"].copy_(final)
    state["conv"].copy_(_last(state["conv"], kept["xBC"], accepted))


def _rows(x: Tensor, accepted: Tensor) -> Tensor:
    """The accepted nodes of x (batch, nodes, ...), in order."""
    count = int(accepted.sum(1)[0])
    return x[accepted.bool()].view(x.shape[0], count, *x.shape[2:])


def _last(old: Tensor, new: Tensor, accepted: Tensor) -> Tensor:
    """The last rows of old and the accepted ones of new, as many as old has; rows of a batch may accept differently."""
    width = old.shape[1]
    on = torch.nn.functional.pad(accepted.bool(), (width, 0), value=True)
    index = ancestor_windows(on[:, None], width)[:, 0]  # (batch, width)
    rows = torch.cat([old, new.to(old.dtype)], dim=1)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def attention_tree(
    mixer: MultiHeadAttention, u: Tensor, state: LayerState, mask: Tensor, position: Tensor
) -> tuple[Tensor, Kept]:
    """An attention mixer on a tree: a node sees what was read and its ancestors; siblings share a position."""
    qkv, mlp = mixer.in_proj(u).split([mixer.qkv_dim, mixer.mlp_dim], dim=-1)
    raw = qkv
    if mixer.conv1d is not None:
        qkv = causal_conv1d_tree(qkv, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mask=mask, state=state["conv"])
    q, k, v = mixer._heads(qkv)
    at = position[:, None] + mask.sum(-1) - 1
    q, k = (rotary(t, at, *mixer.rotary[:2], interleaved=mixer.rotary[2]) for t in (q, k))
    before = mixer.cache.positions(state, position) >= 0
    seen = torch.cat([before[:, None].expand(-1, mask.shape[1], -1), mask.bool()], dim=-1)
    keys, values = (torch.cat([state[n].to(t.dtype), t], dim=1).transpose(1, 2) for n, t in (("k", k), ("v", v)))
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=mixer.scale,
        enable_gqa=mixer.heads != mixer.kv_heads,
    )  # fmt: skip
    return mixer._finish(out.transpose(1, 2), mlp), {"k": k, "v": v, "raw": raw}


def attention_replay(
    mixer: MultiHeadAttention, kept: Kept, state: LayerState, accepted: Tensor, position: Tensor
) -> None:
    """Write the accepted nodes' keys and values behind those that were read."""
    k, v = (_rows(kept[name], accepted) for name in "kv")
    mixer.cache.write(state, k, v, position, None)
    if mixer.conv1d is not None:
        state["conv"].copy_(_last(state["conv"], kept["raw"], accepted))


class TreePass:
    """A model that reads trees: ``logits = tree_pass(tree, state)``, then ``tree_pass.accept(path, state)``.

    Raises ValueError, with the reason, for models that have no tree form.
    """

    def __init__(self, model: CausalLM) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"no tree decoding for this model: {reason}")
        self.model = model
        self._kept: list[Kept] = []
        self._logits = torch.empty(0)

    @torch.no_grad()
    def __call__(self, tree: Tree, state: State) -> Tensor:
        """Logits of what follows each node, (nodes, vocabulary with padding), in one pass. ``state`` stays as it is."""
        model = self.model
        state.check(model.state_name)
        if state.batch != 1:
            raise ValueError(f"the state holds {state.batch} texts; a tree continues one")
        device = state.position.device
        mask = tree.mask()[None].to(device)
        x = model.embed(torch.tensor([tree.tokens], device=device))
        self._kept = []
        for layer, own in zip(model.layers, state.layers, strict=True):
            assert isinstance(layer, Block)
            x = layer._in(x)
            n = normed(layer.norm, x)
            mixer = layer.mixer
            y, kept = (
                mamba2_tree(mixer, n, own, mask)
                if isinstance(mixer, Mamba2)
                else attention_tree(mixer, n, own, mask, state.position)  # type: ignore[arg-type]
            )
            self._kept.append(kept)
            x = x + y
            if layer.mlp is not None:
                assert layer.norm2 is not None
                x = x + layer.mlp(normed(layer.norm2, x))
        self._logits = model.head(normed(model.norm_f, x))[0]
        return self._logits

    @torch.no_grad()
    def accept(self, path: list[int], state: State) -> None:
        """Move ``state`` over the nodes of ``path`` (from the root on) of the tree that was read last."""
        nodes = self._logits.shape[0]
        accepted = torch.zeros(1, nodes, dtype=torch.bool, device=state.position.device)
        accepted[0, path] = True
        for layer, kept, own in zip(self.model.layers, self._kept, state.layers, strict=True):
            mixer = layer.mixer
            if isinstance(mixer, Mamba2):
                mamba2_replay(mixer, kept, own, accepted)
            else:
                attention_replay(mixer, kept, own, accepted, state.position)  # type: ignore[arg-type]
        state.position += len(path)
        state.logits = self._logits[path[-1]][None]
