"""SaShiMi: raw audio, one sample at a time, by S4 layers on a pyramid of rates.

Source: Goel et al., "It's Raw! Audio Generation with State-Space Models", arXiv 2202.09729; state-spaces/s4
``models/sashimi/sashimi.py`` and ``src/models/sequence/backbones/{sashimi,unet}.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing
from zoo.layers.fft_conv import activation, widens
from zoo.models.s4 import SequenceBlock
from zoo.models.s4_parts import Named

State = dict[str, Any]


class PoolLinear(nn.Module):
    """A linear layer and an activation, if wanted with its weight as direction and length (``weight_norm``): rows
    ``weight_g[i] * weight_v[i] / |weight_v[i]|``. Keys ``weight`` or ``weight_g`` (out, 1), ``weight_v``; ``bias``."""

    def __init__(self, d_in: int, d_out: int, weight_norm: bool = False, act: str | None = None) -> None:
        super().__init__()
        made = nn.Linear(d_in, 2 * d_out if widens(act) else d_out)
        self.weight_norm = weight_norm
        if weight_norm:
            self.weight_g = nn.Parameter(made.weight.detach().norm(dim=1, keepdim=True))
            self.weight_v = nn.Parameter(made.weight.detach().clone())
        else:
            self.weight = made.weight
        self.bias = made.bias
        self.act = activation(act)

    def matrix(self) -> Tensor:
        if not self.weight_norm:
            return self.weight
        return self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.linear(x, self.matrix(), self.bias))


class DownPool(nn.Module):
    """Fold ``pool`` neighbouring steps into channels (channel by channel), then a linear to ``expand`` times the
    width."""

    def __init__(self, d_model: int, expand: int, pool: int, **linear: Any) -> None:
        super().__init__()
        self.pool, self.width = pool, d_model
        self.linear = self._linear(d_model, expand, **linear)

    def _linear(self, d_model: int, expand: int, **linear: Any) -> PoolLinear:
        return PoolLinear(d_model * self.pool, d_model * expand, **linear)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self._fold(x.unflatten(1, (-1, self.pool)))

    def _fold(self, x: Tensor) -> Tensor:
        """(..., pool, channels) to (..., expand * channels)."""
        return self.linear(x.transpose(-1, -2).flatten(-2))

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        weight = self.linear.bias
        held = torch.zeros(batch, self.pool, self.width, device=device or weight.device, dtype=dtype or weight.dtype)
        return {"held": held, "count": 0}

    def step(self, x: Tensor, state: State) -> Tensor | None:
        """(batch, channels); the pooled value at every ``pool``-th step, None between."""
        state["held"][:, state["count"]] = x
        state["count"] = (state["count"] + 1) % self.pool
        return self._fold(state["held"]) if state["count"] == 0 else None


class UpPool(nn.Module):
    """A linear to ``pool`` steps of 1 / ``expand`` the width, all of them one pooled step later (so that no output sees
    its own future): the first ``pool`` outputs are zeros."""

    def __init__(self, d_model: int, expand: int, pool: int, **linear: Any) -> None:
        super().__init__()
        self.pool, self.width = pool, d_model // expand
        self.linear = self._linear(d_model, expand, **linear)

    def _linear(self, d_model: int, expand: int, **linear: Any) -> PoolLinear:
        return PoolLinear(d_model, d_model // expand * self.pool, **linear)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self._unfold(F.pad(self.linear(x)[:, :-1], (0, 0, 1, 0))).flatten(1, 2)

    def _unfold(self, x: Tensor) -> Tensor:
        """(..., width * pool) to (..., pool, width)."""
        return x.unflatten(-1, (self.width, self.pool)).transpose(-1, -2)

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        weight = self.linear.bias
        held = torch.zeros(batch, self.pool, self.width, device=device or weight.device, dtype=dtype or weight.dtype)
        return {"held": held, "count": 0}

    def step(self, x: Tensor | None, state: State) -> Tensor:
        """The next of the values that wait. ``x``: the pooled value of this step, there when the last one is taken."""
        y = state["held"][:, state["count"]].clone()
        state["count"] = (state["count"] + 1) % self.pool
        if state["count"] == 0:
            if x is None:
                raise ValueError("the pooled value is due at this step and was not given")
            state["held"].copy_(self._unfold(self.linear(x)))
        return y


class AverageDownPool(DownPool):
    """The mean of ``pool`` neighbouring steps, then a linear to ``expand`` times the width."""

    def _linear(self, d_model: int, expand: int, **linear: Any) -> PoolLinear:
        return PoolLinear(d_model, d_model * expand, **linear)

    def _fold(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(-2))


class RepeatUpPool(UpPool):
    """A linear to 1 / ``expand`` the width, held for ``pool`` steps, all of them one pooled step later."""

    def _linear(self, d_model: int, expand: int, **linear: Any) -> PoolLinear:
        return PoolLinear(d_model, d_model // expand, **linear)

    def _unfold(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.pool, self.width)


class Sashimi(nn.Module):
    """Down to coarse rates by pooling, S4 at the coarsest, up again with S4 at every rate; skips are added.

    Arguments: ``d_model`` at the finest rate, doubled (``expand``) at each of the ``pool`` factors; ``n_layers``
    pairs of S4 and feed-forward (``ff`` times the width; 0: none) at each rate; ``unet``: also on the way down;
    ``layer``: the S4 layer's arguments (:class:`zoo.layers.S4Block`, or another ``type`` of
    :func:`zoo.models.s4.make_layer`), ``center_layer``: those at the coarsest rate; ``norm``, ``residual``: as
    :class:`zoo.models.s4.SequenceBlock`, ``scalar_norm``: one pair of numbers instead of one for each channel;
    ``weight_norm``: of the pooling layers; ``act_pool``: after them; ``pool_mode``: "linear" (a map from all pooled
    steps to all) or "avg" (means and repetition); ``center_ff``: feed-forward at the coarsest rate (None: ``ff``);
    ``dropout``, ``dropres``: in and after each layer.

    ``interp``: a power of two. The pyramid then works on every ``interp``-th step, and outputs of the steps between
    come from layers of their own at 1 / interp, 2 / interp ... 1 / 2 of the rate, which see one step ahead (not
    causal); the length must be a multiple of it.

    Keys ``d_layers.{i}``, ``c_layers.{i}``, ``u_layers.{tier}.{i}``, ``interp_layers.{level}.{i}``, ``norm``.
    """

    def __init__(
        self,
        d_model: int = 64,
        n_layers: int = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        ff: float = 2,
        *,
        unet: bool = False,
        layer: Mapping[str, Any] | None = None,
        center_layer: Mapping[str, Any] | None = None,
        norm: Named = "layer",
        scalar_norm: bool = True,
        prenorm: bool = True,
        residual: bool | Named = True,
        weight_norm: bool = True,
        act_pool: str | None = None,
        pool_mode: str = "linear",
        center_ff: float | None = None,
        interp: int = 0,
        dropout: float = 0.0,
        dropres: float = 0.0,
    ) -> None:
        super().__init__()
        if any(p < 1 for p in pool):
            raise ValueError(f"pool is {list(pool)}; expected factors of at least 1")
        if pool_mode not in ("linear", "avg"):
            raise ValueError(f"pool_mode is {pool_mode!r}; expected 'linear' or 'avg'")
        if interp < 0 or interp & (interp - 1) or interp == 1:
            raise ValueError(f"interp is {interp}; expected 0 or a power of two")
        self.d_model, self.pool, self.unet, self.interp, self.act_pool = d_model, tuple(pool), unet, interp, act_pool
        pooling = {"weight_norm": weight_norm, "act": act_pool}
        fine: dict[str, Any] = {"type": "s4", "dropout_p": dropout, **dict(layer or {})}
        coarse = fine if center_layer is None else {"type": "s4", "dropout_p": dropout, **center_layer}
        self.causal = not (fine.get("bidirectional", False) or coarse.get("bidirectional", False) or interp)

        def block(width: int, config: Mapping[str, Any], index: int) -> SequenceBlock:
            return SequenceBlock(
                width, config, prenorm=prenorm, norm=norm, transposed=scalar_norm,
                residual=residual, dropout_p=dropres, index=index,
            )  # fmt: skip

        def pair(width: int, wide: float, index: int, config: Mapping[str, Any] = fine) -> Iterator[SequenceBlock]:
            yield block(width, config, index)
            if wide > 0:
                yield block(width, {"type": "ff", "expand": wide, "dropout_p": dropout}, index)

        def blocks(width: int, wide: float, config: Mapping[str, Any] = fine) -> Iterator[SequenceBlock]:
            for i in range(n_layers):
                yield from pair(width, wide, i + 1, config)

        width = d_model
        down: list[nn.Module] = []
        for p in self.pool:
            if unet:
                down += blocks(width, ff)
            down.append((DownPool if pool_mode == "linear" else AverageDownPool)(width, expand, p, **pooling))
            width *= expand
        self.d_layers = nn.ModuleList(down)
        self.c_layers = nn.ModuleList(blocks(width, ff if center_ff is None else center_ff, coarse))
        up: list[nn.Module] = []
        for p in reversed(self.pool):
            pooled = (UpPool if pool_mode == "linear" else RepeatUpPool)(width, expand, p, **pooling)
            width //= expand
            up.append(nn.ModuleList([pooled, *blocks(width, ff)]))
        self.u_layers = nn.ModuleList(up)
        self.norm = nn.LayerNorm(d_model)
        if interp:
            levels = interp.bit_length() - 1
            self.interp_layers = nn.ModuleList(
                nn.ModuleList([*pair(width, ff, i + 1), *pair(width, ff, i + 1)]) for i in range(levels)
            )

    @property
    def factor(self) -> int:
        """Samples to one step of the coarsest rate."""
        return torch.Size(self.pool).numel()

    def forward(self, x: Tensor, mids: dict[str, Tensor] | None = None) -> Tensor:
        """(batch, length, d_model) to the same. ``mids`` collects the values between the parts, channels first.

        A causal model takes any length; a bidirectional one a multiple of the product of ``pool``, and one that
        interpolates a multiple of ``interp`` times that (ValueError).
        """
        if not self.interp:
            return self._pyramid(x, mids)
        if x.shape[1] % self.interp or x.shape[1] <= self.interp:
            raise ValueError(
                f"the length is {x.shape[1]}; with interp it must be a multiple of {self.interp}, and above"
            )
        y = torch.zeros_like(x)
        every = self.interp
        for tier in self.interp_layers:
            z = x[:, ::every]
            for layer in tier:  # type: ignore[attr-defined]
                z = layer(z)
            # each step learns of the next one; the last of all repeats its own
            y[:, every // 2 - 1 :: every] += torch.cat([z[:, 1:], z[:, -1:]], 1)
            every //= 2
        y[:, self.interp - 1 :: self.interp] = self._pyramid(x[:, :: self.interp], mids)
        return y

    def _pyramid(self, x: Tensor, mids: dict[str, Tensor] | None) -> Tensor:
        length = x.shape[1]
        short = -length % self.factor
        if short and not self.causal:
            raise ValueError(f"the length is {length}; a bidirectional SaShiMi needs a multiple of {self.factor}")
        if short:  # what follows changes nothing before it
            x = torch.cat([x, x[:, -1:].expand(-1, short, -1)], dim=1)
        skips = [x]
        for i, layer in enumerate(self.d_layers):
            x = layer(x)
            skips.append(x)
            _note(mids, f"after_d{i}", x)
        for i, layer in enumerate(self.c_layers):
            x = layer(x)
            _note(mids, f"after_c{i}", x)
        x = x + skips.pop()
        for t, tier in enumerate(self.u_layers):
            for i, layer in enumerate(tier):  # type: ignore[arg-type]
                x = layer(x)
                if i == 0 and mids is not None and "after_first_uppool" not in mids:
                    _note(mids, "after_first_uppool", x)
                if self.unet or i == 0:
                    x = x + skips.pop()
                if not self.unet and i == 0:
                    skips.append(x)
            if not self.unet:
                x = x + skips.pop()
            _note(mids, f"after_u{t}", x)
        return self.norm(x)[:, :length]

    # -- one sample at a time ----------------------------------------------------------------------------------------

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        """A state at rest; its size does not depend on how much has been heard.

        Raises ValueError for a bidirectional model.
        """
        if not self.causal:
            raise ValueError("a bidirectional or interpolating SaShiMi cannot step; it has no state")
        kind = {"device": device, "dtype": dtype}
        return {
            "down": [layer.init_state(batch, **kind) for layer in self.d_layers],  # type: ignore[operator]
            "center": [layer.init_state(batch, **kind) for layer in self.c_layers],  # type: ignore[operator]
            "up": [[layer.init_state(batch, **kind) for layer in tier] for tier in self.u_layers],  # type: ignore[union-attr, operator]
        }

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, d_model) to the same; ``state`` moves on in place. A rate whose step is not due does nothing."""
        now: Tensor | None = x
        skips: list[Tensor | None] = [x]
        for layer, own in zip(self.d_layers, state["down"], strict=True):
            now = None if now is None else layer.step(now, own)  # type: ignore[operator]
            skips.append(now)
        if now is not None:
            for layer, own in zip(self.c_layers, state["center"], strict=True):
                now = layer.step(now, own)  # type: ignore[operator]
        now = _sum(now, skips.pop())
        for tier, states in zip(self.u_layers, state["up"], strict=True):
            now = self._step_up(list(tier), states, now, skips)  # type: ignore[arg-type]
        assert now is not None
        return self.norm(now)

    def _step_up(self, tier: list[nn.Module], states: list[State], now: Tensor | None, skips: list[Tensor | None]):
        """One tier of the way up: nothing happens where its rate is not due (its skip is None)."""
        due = skips[-1] is not None
        if not due:
            for _ in tier if self.unet else tier[:1]:
                skips.pop()
            return None
        for i, (layer, own) in enumerate(zip(tier, states, strict=True)):
            now = layer.step(now, own)  # type: ignore[operator]
            if self.unet or i == 0:
                now = _sum(now, skips.pop())
            if not self.unet and i == 0:
                skips.append(now)
        return now if self.unet else _sum(now, skips.pop())


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _note(mids: dict[str, Tensor] | None, name: str, x: Tensor) -> None:
    if mids is not None:
        mids[name] = x.transpose(1, 2)


class SashimiLM(GradCheckpointing, nn.Module):
    """Tokens in, logits of the next token out: embedding, :class:`Sashimi`, a linear head.

    ``vocab_size``: 256 for 8-bit samples. Other arguments: :class:`Sashimi`. Keys ``encoder``, ``model``, ``decoder``.
    """

    def __init__(self, vocab_size: int = 256, d_model: int = 64, *, sample_rate: int = 16000, **backbone: Any) -> None:
        super().__init__()
        self.vocab_size, self.sample_rate = vocab_size, sample_rate
        self.encoder = nn.Embedding(vocab_size, d_model)
        self.model = Sashimi(d_model, **backbone)
        self.decoder = nn.Linear(d_model, vocab_size)

    def no_weight_decay(self) -> set[str]:
        """The parameters of S4's state matrices and step sizes, as S4 is trained."""
        ends = ("A_real", "A_imag", ".B", ".P", "inv_dt")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) int64 to (batch, length, vocab_size)."""
        return self.decoder(self.model(self.encoder(tokens)))

    def init_state(self, batch: int, **kind: Any) -> State:
        return self.model.init_state(batch, **kind)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """(batch,) tokens to (batch, vocab_size) logits; ``state`` moves on in place."""
        return self.decoder(self.model.step(self.encoder(tokens), state))


def sashimi(**config: Any) -> SashimiLM:
    """Builder of the cards."""
    return SashimiLM(**config)
