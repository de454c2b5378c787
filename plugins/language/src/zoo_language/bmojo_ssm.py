"""The recurrences that fade in B'MOJO's memory: grouped Mamba-2, gated DeltaNet, gated KalmaNet.

Original: awslabs/hybrid-model-factory @ 04b6242, Apache-2.0 (``hybrid_zoo/layers/mamba/mamba2.py``,
``gated_deltanet/gdn.py``, ``gated_kalmanet/gka.py``). Papers: arXiv 2405.21060 (Mamba-2), 2412.06464 (gated DeltaNet),
2511.21016 (gated KalmaNet). Grouped as attention is: H query heads, K key and value heads, P channels each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GatedRMSNorm, Linear, RMSNorm
from zoo.layers.init import inverse_softplus_log_uniform
from zoo_kernels import causal_conv1d, linear_attention, ssd

from .state import LayerState


def rotate(x: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
    """Half-rotation of x (batch, length, heads, P) by (cos, sin), each (1 or batch, length, P)."""
    cos, sin = (t[:, :, None].to(x.dtype) for t in phases)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (batch, length, ...) with zeros behind each row's end."""
    if lengths is None:
        return x
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x * real.reshape(*real.shape, *(1,) * (x.dim() - 2)).to(x.dtype)


def _conv(x: Tensor, conv: nn.Conv1d, state: LayerState | None, name: str, lengths: Tensor | None) -> Tensor:
    """silu of a causal depthwise convolution whose last inputs are kept in ``state[name]``."""
    y, end = causal_conv1d(
        x, conv.weight.squeeze(1), conv.bias, activation="silu", lengths=lengths,
        initial_state=None if state is None else state[name], return_final_state=state is not None,
    )  # fmt: skip
    if state is not None:
        assert end is not None
        state[name].copy_(end.detach())
    return y


class GroupedMamba2(nn.Module):
    """Mamba-2 with attention's grouping: x and B have K heads and are repeated, C and the gate have H.

    Arguments: ``d_model``, ``heads``, ``kv_heads``, ``head_dim``; ``bc_norm``: RMS norms of B and C, a head at a time,
    before the convolution; ``bc_rotary``: rotary phases on them, behind those norms.
    """

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, *, bc_norm: bool = True, bc_rotary: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.bc_rotary = heads, kv_heads, head_dim, bc_rotary
        inner, small = heads * head_dim, kv_heads * head_dim
        self.sizes = [inner, small, small, inner, heads]  # z, x, B, C, dt
        self.in_proj = Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(2 * small + inner, 2 * small + inner, 4, groups=2 * small + inner)
        self.dt_bias, self.A_log = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.B_norm = RMSNorm(head_dim, 1e-6) if bc_norm else None
        self.C_norm = RMSNorm(head_dim, 1e-6) if bc_norm else None
        self.norm = GatedRMSNorm(inner, 1e-5, groups=heads)
        self.out_proj = Linear(inner, d_model, bias=False)
        _reset(self.dt_bias, self.A_log)

    def init_state(self, batch: int) -> LayerState:
        weight = self.in_proj.weight
        return {
            "conv": weight.new_zeros(batch, 4, self.conv1d.weight.shape[0]),
            "ssm": torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=weight.device),
        }

    def forward(
        self,
        x: Tensor,
        phases: tuple[Tensor, Tensor] | None = None,
        *,
        state: LayerState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, d_model) to the same; ``state`` moves on in place."""
        z, u, B, C, dt = self.in_proj(x).split(self.sizes, dim=-1)
        B, C = (t.unflatten(-1, (-1, self.head_dim)) for t in (B, C))
        if self.B_norm is not None and self.C_norm is not None:
            B, C = self.B_norm(B), self.C_norm(C)
        if self.bc_rotary:
            assert phases is not None
            B, C = rotate(B, phases), rotate(C, phases)
        mixed = _conv(torch.cat([u, B.flatten(-2), C.flatten(-2)], dim=-1), self.conv1d, state, "conv", lengths)
        u, B, C = (t.unflatten(-1, (-1, self.head_dim)) for t in mixed.split(self.sizes[1:4], dim=-1))
        repeat = self.heads // self.kv_heads
        y, end = ssd(
            u.repeat_interleave(repeat, dim=2), dt, -torch.exp(self.A_log.float()), B.repeat_interleave(repeat, dim=2),
            C, self.D.float(), dt_bias=self.dt_bias.float(), dt_softplus=True, lengths=lengths,
            initial_state=None if state is None else state["ssm"], return_final_state=state is not None,
        )  # fmt: skip
        if state is not None:
            assert end is not None
            state["ssm"].copy_(end.detach())
        return self.out_proj(self.norm(y.flatten(-2), z))


def _reset(dt_bias: nn.Parameter, A_log: nn.Parameter) -> None:
    """dt log-uniform in [0.001, 0.1], A uniform in (0, 16)."""
    with torch.no_grad():
        dt_bias.copy_(inverse_softplus_log_uniform(dt_bias, 1e-3, 0.1, 1e-4))
        A_log.copy_(torch.empty_like(A_log).uniform_(1e-3, 16).log())


class LowRank(nn.Module):
    """``B(silu(A x))``, B zero at first."""

    def __init__(self, width: int, rank: int, out: int) -> None:
        super().__init__()
        self.linearA, self.linearB = Linear(width, rank, bias=False), Linear(rank, out, bias=False)
        nn.init.zeros_(self.linearB.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linearB(F.silu(self.linearA(x)))


class GatedMemory(nn.Module):
    """What gated DeltaNet and gated KalmaNet share: projections, convolutions, decay, norm and gate of the output.

    Arguments: ``d_model``, ``heads``, ``kv_heads``, ``head_dim``; ``use_gate``: silu(g_proj x) on the output;
    ``conv_size``; ``norm_eps``; ``kv_proj_rank``: keys and values are repeated to H heads *plus* a low-rank function of
    all of them, ``kv_learnable_residual``: the repetition is a learnt matrix.
    """

    decay_name = "gk_proj"

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        use_gate: bool,
        convolved: str,
        conv_size: int,
        conv_bias: bool,
        norm_eps: float,
        kv_proj_rank: int | None,
        kv_learnable_residual: bool,
        beta_bias: bool | None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.conv_size = heads, kv_heads, head_dim, conv_size
        self.convolved = convolved
        inner, small = heads * head_dim, kv_heads * head_dim
        widths = {"q": inner, "k": small, "v": small}
        for name, width in widths.items():
            setattr(self, f"{name}_proj", Linear(d_model, width, bias=False))
            if name in convolved:
                conv = nn.Conv1d(width, width, conv_size, groups=width, bias=conv_bias)
                setattr(self, f"{name}_conv1d", conv)
        setattr(self, self.decay_name, Linear(d_model, heads, bias=False))
        self.b_proj = None if beta_bias is None else Linear(d_model, heads, bias=beta_bias)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.g_proj = Linear(d_model, inner, bias=False) if use_gate else None
        self.o_norm = RMSNorm(head_dim, norm_eps)
        self.o_proj = Linear(inner, d_model, bias=False)
        # Where there is nothing to expand the original makes these too, and does not use them.
        self.low_rank = kv_proj_rank is not None
        self.expands = self.low_rank and heads > kv_heads
        if kv_proj_rank is not None:
            self.proj_k, self.proj_v = LowRank(small, kv_proj_rank, inner), LowRank(small, kv_proj_rank, inner)
        self.learnt_repeat = kv_proj_rank is not None and kv_learnable_residual
        if self.learnt_repeat:
            ones = torch.eye(kv_heads).repeat_interleave(heads // kv_heads, dim=0)
            self.k_rep, self.v_rep = nn.Parameter(ones), nn.Parameter(ones.clone())
        _reset(self.dt_bias, self.A_log)

    def init_state(self, batch: int) -> LayerState:
        weight = self.o_proj.weight
        inner, small = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = {"q": inner, "k": small, "v": small}
        state = {f"conv_{n}": weight.new_zeros(batch, self.conv_size, widths[n]) for n in self.convolved}
        return state | {"memory": torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=weight.device)}

    def _project(self, x: Tensor, name: str, state: LayerState | None, lengths: Tensor | None) -> Tensor:
        y = getattr(self, f"{name}_proj")(x)
        return (
            _conv(y, getattr(self, f"{name}_conv1d"), state, f"conv_{name}", lengths) if name in self.convolved else y
        )

    def _expand(self, x: Tensor, name: str) -> Tensor:
        """Keys or values of K heads (batch, length, K P) to (batch, length, H, P)."""
        heads = x.unflatten(-1, (self.kv_heads, self.head_dim))
        if not self.expands:
            return heads.repeat_interleave(self.heads // self.kv_heads, dim=2)
        if self.learnt_repeat:
            repeated = torch.einsum("hk,blkp->blhp", getattr(self, f"{name}_rep"), heads)
        else:
            repeated = heads.repeat_interleave(self.heads // self.kv_heads, dim=2)
        return repeated + getattr(self, f"proj_{name}")(x).unflatten(-1, (self.heads, self.head_dim))

    def _decay(self, x: Tensor) -> Tensor:
        """Log decay a head, (batch, length, H), float32."""
        rate = getattr(self, self.decay_name)(x).float() + self.dt_bias.float()
        return -torch.exp(self.A_log.float()) * F.softplus(rate)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.o_norm(y.to(x.dtype)).flatten(-2)
        return self.o_proj(y if self.g_proj is None else y * F.silu(self.g_proj(x)))


class GatedDeltaNet(GatedMemory):
    """S = e^g S + k (beta (v - (e^g S)^T k))^T, y = S^T q / sqrt(P), q and k of length one."""

    decay_name = "gk_proj"

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        kv_proj_rank: int | None = None,
        kv_learnable_residual: bool = False,
    ) -> None:
        super().__init__(
            d_model, heads, kv_heads, head_dim, use_gate=use_gate, convolved="qkv" if use_short_conv else "",
            conv_size=conv_size, conv_bias=conv_bias, norm_eps=norm_eps, kv_proj_rank=kv_proj_rank,
            kv_learnable_residual=kv_learnable_residual, beta_bias=False,
        )  # fmt: skip
        self.allow_neg_eigval = allow_neg_eigval

    def forward(
        self,
        x: Tensor,
        phases: tuple[Tensor, Tensor] | None = None,
        *,
        state: LayerState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, d_model) to the same; ``phases`` are not used; ``state`` moves on in place."""
        q, k, v = (self._project(x, name, state, lengths) for name in "qkv")
        if not self.convolved:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k, v = self._expand(k, "k"), self._expand(v, "v")
        q, k = (t.float() * (t.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        assert self.b_proj is not None
        beta = torch.sigmoid(self.b_proj(x).float()) * (2 if self.allow_neg_eigval else 1)
        y, end = gated_delta_rule(
            q * self.head_dim**-0.5, k, v.float(), _within(self._decay(x), lengths), _within(beta, lengths),
            None if state is None else state["memory"],
        )  # fmt: skip
        if state is not None:
            state["memory"].copy_(end.detach())
        return self._finish(y, x)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """``S_t = e^(g_t) S_(t-1) + k_t (beta_t (v_t - (e^(g_t) S_(t-1))^T k_t))^T``, ``y_t = S_t^T q_t``, in chunks.

    q, k: (batch, length, heads, P); v: (batch, length, heads, V); g (log decay), beta: (batch, length, heads);
    state: (batch, heads, P, V). Returns (y, final state). Within a chunk the corrections solve one triangular system
    (Yang et al., "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, section 3).
    """
    batch, length, heads, width = q.shape
    S = q.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, length, P)
    g, beta = g.transpose(1, 2), beta.transpose(1, 2)
    found = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        qc, kc, vc, b = q[:, :, part], k[:, :, part], v[:, :, part], beta[:, :, part, None]
        total = g[:, :, part].cumsum(-1)
        steps = total.shape[-1]
        at = torch.arange(steps, device=q.device)
        past = at[:, None] >= at
        # e^(total_i - total_j) for j <= i: masked before the exponential, which may overflow above the diagonal
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
        system = torch.eye(steps, device=q.device, dtype=q.dtype) + b * (kc @ kc.transpose(-1, -2)) * decay.tril(-1)
        wanted = b * (vc - total.exp()[..., None] * (kc @ S))
        u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        found.append(total.exp()[..., None] * (qc @ S) + (qc @ kc.transpose(-1, -2) * decay) @ u)
        rest = (total[..., -1:] - total).exp()[..., None]
        S = total[..., -1].exp()[..., None, None] * S + (kc * rest).transpose(-1, -2) @ u
    return torch.cat(found, dim=2).transpose(1, 2), S


class GatedKalmaNet(GatedMemory):
    """A memory read through an approximate ridge regression: y = S^T q' / sqrt(P) with q' near (G + lam I)^-1 q.

    ``num_iter`` steps of Chebyshev's iteration stop about 3e-4 from the exact solution, and are the definition here.
    The ridge is ``ridge_strength`` times the Frobenius norm of G. ``bp_lambda``: gradients pass through that norm.
    """

    decay_name = "a_proj"

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        use_beta_gate: bool = True,
        use_alpha_connection: bool = True,
        use_v_conv: bool = True,
        use_forgetting_gate: bool = True,
        use_forgetting_gate_kk: bool = True,
        gla_rescale: bool = True,
        num_iter: int = 30,
        ridge_strength: float = 0.02,
        use_gate: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        bp_lambda: bool = True,
        kv_proj_rank: int | None = None,
        kv_learnable_residual: bool = False,
    ) -> None:
        super().__init__(
            d_model, heads, kv_heads, head_dim, use_gate=use_gate, convolved="qkv" if use_v_conv else "qk",
            conv_size=conv_size, conv_bias=False, norm_eps=norm_eps, kv_proj_rank=kv_proj_rank,
            kv_learnable_residual=kv_learnable_residual, beta_bias=True if use_beta_gate else None,
        )  # fmt: skip
        self.alpha_proj = Linear(d_model, heads, bias=True) if use_alpha_connection else None
        self.forgets, self.forgets_kk = use_forgetting_gate, use_forgetting_gate and use_forgetting_gate_kk
        self.scale = head_dim**-0.5 if gla_rescale else 1.0
        self.num_iter, self.ridge_strength, self.bp_lambda = num_iter, ridge_strength, bp_lambda

    def init_state(self, batch: int) -> LayerState:
        state = super().init_state(batch)
        return state | {"gram": torch.zeros_like(state["memory"])}

    def forward(
        self,
        x: Tensor,
        phases: tuple[Tensor, Tensor] | None = None,
        *,
        state: LayerState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, d_model) to the same; ``phases`` are not used; ``state`` moves on in place."""
        q, k, v = (self._project(x, name, state, lengths) for name in "qkv")
        q = q.unflatten(-1, (self.heads, self.head_dim)).float()
        k, v = self._expand(k, "k").float(), self._expand(v, "v").float()
        q, k = (t / (t.norm(dim=-1, keepdim=True) + 1e-6) for t in (q, k))
        if self.b_proj is not None:
            beta = torch.sigmoid(self.b_proj(x).float())[..., None] + 1e-6
            k, v = k * beta, v * beta
        k, v = _within(k, lengths), _within(v, lengths)
        g = _within(self._decay(x), lengths) if self.forgets else torch.zeros_like(k[..., 0])
        memory, gram = (None, None) if state is None else (state["memory"], state["gram"])
        if self.num_iter:
            solved, gram = self._solve(q, k, g if self.forgets_kk else torch.zeros_like(g), gram)
            if self.alpha_proj is not None:
                solved = q + torch.sigmoid(self.alpha_proj(x).float())[..., None] * (solved - q)
            q = solved
        y, end = linear_attention(q * self.scale, k, v, g, initial_state=memory, return_final_state=state is not None)
        if state is not None:
            assert isinstance(end, Tensor)
            state["memory"].copy_(end.detach())
            if gram is not None:
                state["gram"].copy_(gram.detach())
        return self._finish(y, x)

    def _solve(self, q: Tensor, k: Tensor, g: Tensor, gram: Tensor | None, chunk: int = 32) -> tuple[Tensor, Tensor]:
        """The iteration at every position, and the last Gram matrix; ``chunk`` matrices are held at a time."""
        batch, length, heads, width = q.shape
        G = q.new_zeros(batch, heads, width, width) if gram is None else gram.to(q.dtype)
        found = []
        for start in range(0, length, chunk):
            grams = []
            for t in range(start, min(start + chunk, length)):
                G = g[:, t].exp()[..., None, None] * G + k[:, t, :, :, None] * k[:, t, :, None]
                grams.append(G)
            found.append(self._chebyshev(torch.stack(grams, dim=1), q[:, start : start + chunk]))
        return torch.cat(found, dim=1), G

    def _chebyshev(self, G: Tensor, q: Tensor) -> Tensor:
        """G (..., P, P), q (..., P): ``num_iter`` steps towards (G + lam I) x = q from x = eta q."""
        size = torch.linalg.matrix_norm(G)
        if not self.bp_lambda:
            size = size.detach()
        size = size.clamp(min=1e-12)[..., None]  # nothing was read yet: zero would be divided by zero
        ridge = self.ridge_strength * size
        eta = 2 / (2 * ridge + size)
        r = (size / (2 * ridge + size)).square() / 4
        x_prev, x, w = torch.zeros_like(q), eta * q, torch.full_like(r, 2.0)
        for _ in range(self.num_iter):
            w = 1 / (1 - r * w)
            residual = (G @ x[..., None])[..., 0] + ridge * x - q
            x, x_prev = w * (x - eta * residual) - (w - 1) * x_prev, x
        return x


SSMS: dict[str, Any] = {
    "mamba2": GroupedMamba2,
    "gdn": GatedDeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "gka": GatedKalmaNet,
    "gated_kalmanet": GatedKalmaNet,
}
