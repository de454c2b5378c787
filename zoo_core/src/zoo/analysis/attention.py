"""The attentions of the framework's study as layers, with the original's parameter names.

Original: IntelligentControlSystems/dsf-mqar @ 7c5aff8 (``zoology/mixers/attention.py``), Apache-2.0; NormAttention:
IntelligentControlSystems/Task-Level-Insights-from-Eigenvalues-across-Sequence-Models @ 67d8254
(``models/norm_attention.py``), BSD-2-Clause.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear
from zoo_kernels import causal_conv1d
from zoo_kernels import linear_attention as scan

from .formulas import softmax_eta


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * d) to (batch, length, heads, d)."""
    if x.shape[-1] % heads:
        raise ValueError(f"{x.shape[-1]} channels do not divide into {heads} heads")
    return x.unflatten(-1, (heads, -1))


def positive(x: Tensor) -> Tensor:
    """elu + 1, the feature map of linear attention."""
    return F.elu(x) + 1


class CausalAttention(nn.Module):
    """Causal attention of d_qk-wide queries and keys: linear (elu + 1, no scale) or softmax.

    Arguments (the original's): ``d_model``, ``d_qk`` (of all heads; None: ``d_model``), ``num_heads``, ``bias`` (of Wqk
    and Wv; out_proj always has one), ``lin_att``, ``dropout``. Softmax adds -10000 above the diagonal, not minus
    infinity, as the original.
    """

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = True, lin_att: bool = True,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        d_qk = d_model if d_qk is None else d_qk
        self.d_model, self.num_heads, self.lin_att = d_model, num_heads, lin_att
        self.Wqk = Linear(d_model, 2 * d_qk, bias=bias)
        self.Wv = Linear(d_model, d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys (softmax: themselves, keys scaled) and values, (batch, length, heads, ...)."""
        q, k = (_heads(t, self.num_heads) for t in self.Wqk(x).chunk(2, dim=-1))
        v = _heads(self.Wv(x), self.num_heads)
        return (positive(q), positive(k), v) if self.lin_att else (q, k / q.shape[-1] ** 0.5, v)

    def log_eta(self, x: Tensor) -> Tensor:
        """log of the normaliser in float64, (batch, heads, length)."""
        q, k, _ = (t.double() for t in self.parts(x))
        if self.lin_att:
            return torch.einsum("blhn,blhn->bhl", q, k.cumsum(1)).log()
        return softmax_eta(torch.einsum("blhn,bmhn->bhlm", q, k))

    def eigenvalues(self, x: Tensor) -> Tensor:
        """eta_(i-1) / eta_i in float64, (batch, heads, length - 1)."""
        log = self.log_eta(x)
        return torch.exp(log[..., :-1] - log[..., 1:])

    def mix(self, x: Tensor) -> Tensor:
        """What out_proj receives, (batch, length, d_model)."""
        q, k, v = self.parts(x)
        if self.lin_att and not (self.training and self.dropout.p):
            total = torch.einsum("blhn,blhn->blh", q, k.cumsum(1))
            y, _ = scan(q, k, v)
            return (y / total[..., None]).flatten(2)
        scores = torch.einsum("blhn,bmhn->bhlm", q, k)
        if self.lin_att:
            scores = scores.tril()
            weights = scores / scores.sum(-1, keepdim=True)
        else:
            above = torch.full(scores.shape[-2:], -10000.0, device=x.device, dtype=x.dtype).triu(1)
            weights = (scores + above).softmax(-1)
        return torch.einsum("bhlm,bmhp->blhp", self.dropout(weights), v).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        return self.out_proj(self.mix(x))


class NormalisedAttention(CausalAttention):
    """The paper's proposal: scores q.k without features or scale, over exp(n_t), n = Wn x of the query's position."""

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(d_model, d_qk, num_heads, bias, True, dropout)
        self.Wn = Linear(d_model, num_heads, bias=bias)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (_heads(t, self.num_heads) for t in self.Wqk(x).chunk(2, dim=-1))
        return q, k, _heads(self.Wv(x), self.num_heads)

    def log_eta(self, x: Tensor) -> Tensor:
        return self.Wn(x).double().transpose(1, 2)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        inverse = torch.exp(-self.Wn(x))
        if self.training and self.dropout.p:
            weights = torch.einsum("blhn,bmhn->bhlm", q, k).tril() * inverse.transpose(1, 2)[..., None]
            return torch.einsum("bhlm,bmhp->blhp", self.dropout(weights), v).flatten(2)
        y, _ = scan(q, k, v)
        return (y * inverse[..., None]).flatten(2)


class GatedAttention(nn.Module):
    """Mamba's block with attention in place of the scan: in_proj to x and z, convolution, attention, silu(z), out_proj.

    Arguments: those of :class:`CausalAttention`, whose ``bias`` is off here, ``d_conv`` and ``conv_bias``.
    """

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = False, lin_att: bool = True,
        dropout: float = 0.0, d_conv: int = 4, conv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        d_qk = d_model if d_qk is None else d_qk
        self.in_proj = Linear(d_model, 2 * d_model, bias=bias)
        self.conv1d = nn.Conv1d(d_model, d_model, d_conv, groups=d_model, bias=conv_bias)
        self.Wqk, self.Wv = Linear(d_model, 2 * d_qk, bias=bias), Linear(d_model, d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model)
        self.num_heads, self.lin_att, self.dropout = num_heads, lin_att, nn.Dropout(dropout)

    parts, log_eta, eigenvalues = CausalAttention.parts, CausalAttention.log_eta, CausalAttention.eigenvalues

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        return self.out_proj(CausalAttention.mix(self, x) * F.silu(z))  # type: ignore[arg-type]


#: The follow-up's functions g in 1 / eta = exp(-g(n + offset)).
NORMS = {"exp": torch.exp, "elu": F.elu, "softplus": F.softplus, "sigmoid": torch.sigmoid}


class NormAttention(nn.Module):
    """The follow-up study's normalised attention: one projection for v, q, k and the norm.

    Arguments: ``d_model``, ``d_qk`` (None: ``d_model``), ``num_heads``, ``bias``; ``norm_fn`` g of 1 / eta = exp(-g(n +
    offset)): "exp", "elu", "softplus", "sigmoid"; ``offset``: learnt, one a head; ``approx_fn``: "none" or "elu" (elu +
    1 on q and k); ``dim_conv``: taps of a causal convolution with silu on v, q, k (``conv_type`` "full") or q, k
    ("partial"), 0: none; ``scale_B``: keys over sqrt(head width); ``dropout`` behind the attention.
    """

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = True, norm_fn: str = "exp",
        offset: bool = False, approx_fn: str | None = "none", dim_conv: int = 0, conv_type: str = "full",
        scale_B: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        d_qk = d_model if d_qk is None else d_qk
        if norm_fn not in NORMS:
            raise ValueError(f"norm_fn is {norm_fn!r}; expected one of {', '.join(NORMS)}")
        if approx_fn not in (None, "none", "elu"):
            raise ValueError(f"approx_fn is {approx_fn!r}; expected 'none' or 'elu'")
        if conv_type not in ("full", "partial"):
            raise ValueError(f"conv_type is {conv_type!r}; expected 'full' or 'partial'")
        self.sizes = [d_model, d_qk, d_qk, num_heads]
        self.num_heads, self.norm_fn, self.approx_fn, self.scale_B = num_heads, norm_fn, approx_fn, scale_B
        self.conv_type = conv_type
        self.Wvqkn = Linear(d_model, sum(self.sizes), bias=bias)
        width = 2 * d_qk + (d_model if conv_type == "full" else 0)
        self.conv1d = nn.Conv1d(width, width, dim_conv, groups=width) if dim_conv else None
        self.offset = nn.Parameter(torch.zeros(num_heads)) if offset else None
        self.out_proj = Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values, (batch, length, heads, ...)."""
        vqk = self.Wvqkn(x)[..., : -self.num_heads]
        if self.conv1d is not None:
            kept, mixed = (
                (vqk[..., :0], vqk)
                if self.conv_type == "full"
                else vqk.split([self.sizes[0], 2 * self.sizes[1]], dim=-1)
            )
            mixed, _ = causal_conv1d(mixed, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
            vqk = torch.cat([kept, mixed], dim=-1)
        v, q, k = (_heads(t, self.num_heads) for t in vqk.split(self.sizes[:3], dim=-1))
        if self.approx_fn == "elu":
            q, k = positive(q), positive(k)
        return q, k / k.shape[-1] ** 0.5 if self.scale_B else k, v

    def _log_eta(self, x: Tensor) -> Tensor:
        n = self.Wvqkn(x)[..., -self.num_heads :]
        return NORMS[self.norm_fn](n if self.offset is None else n + self.offset)

    def log_eta(self, x: Tensor) -> Tensor:
        """log of the normaliser in float64, (batch, heads, length)."""
        return self._log_eta(x).double().transpose(1, 2)

    eigenvalues = CausalAttention.eigenvalues

    def mix(self, x: Tensor) -> Tensor:
        """What out_proj receives, (batch, length, d_model)."""
        q, k, v = self.parts(x)
        y, _ = scan(q, k, v)
        return self.dropout(y * torch.exp(-self._log_eta(x))[..., None]).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        return self.out_proj(self.mix(x))
