"""SpaceTime: forecasting with companion state-space models, the last of which runs on its own predictions.

Paper: Zhang, Saab, Poli, Dao, Goel and Ré, "Effectively Modeling Time Series with Simple Discrete State Spaces",
arXiv 2303.09489. Original: HazyResearch/spacetime @ 7b7398c, Apache-2.0 (``model/{network,block,mlp}.py``).
Differs from the original: the model itself centres a window and brings the forecast back; a history can be held as a
state and fed one step at a time (:meth:`SpaceTime.init_stream`); how kernels are computed, see :mod:`.ssm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, Recomputed

from ._base import TRANSFORMS, Affine, Forecaster, affine_of, call_with
from .ssm import PREPROCESSING, SSMS, ClosedLoopCompanionSSM

Config = Mapping[str, Any]


class Repeat(nn.Module):
    """(batch, length, d_in) to (batch, length, D): copies of the whole input side by side."""

    def __init__(
        self, input_dim: int, embedding_dim: int | None = None, n_heads: int | None = None, n_kernels: int | None = None
    ) -> None:
        super().__init__()
        if embedding_dim is None:
            if n_heads is None or n_kernels is None:
                raise ValueError("embedding_dim is None; expected it, or n_heads and n_kernels")
            embedding_dim = input_dim * n_heads * n_kernels
        if embedding_dim % input_dim:
            raise ValueError(f"embedding_dim is {embedding_dim}; expected a multiple of input_dim {input_dim}")
        self.copies = embedding_dim // input_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, self.copies)


class LinearEmbedding(nn.Module):
    """A linear layer; keys ``layers.{weight,bias}``. ``n_heads``, ``n_kernels`` are taken and not used: the original's
    own configuration file names them."""

    def __init__(
        self, input_dim: int, embedding_dim: int | None = None, n_heads: int | None = None, n_kernels: int | None = None
    ) -> None:
        super().__init__()
        if embedding_dim is None:
            raise ValueError("embedding_dim is None; a linear embedding needs its width")
        self.layers = Linear(input_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def embedding(config: Config) -> nn.Module:
    """ "repeat", "linear" or "identity", with its arguments under ``kwargs``."""
    kinds: dict[Any, type[nn.Module]] = {"repeat": Repeat, "linear": LinearEmbedding}
    if config["method"] in ("identity", None):
        return nn.Identity()
    if config["method"] not in kinds:
        raise ValueError(f"the embedding's method is {config['method']!r}; expected repeat, linear or identity")
    return call_with(kinds[config["method"]], config["kwargs"], f"the embedding {config['method']}")


class ChannelDropout(nn.Module):
    """Dropout of whole channels of (batch, length, channels)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is {p + 1}, a channel dropout of {p}; expected at least 1 and less than 2")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (torch.rand(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1], device=x.device) < 1 - self.p).to(x.dtype)
        return x * kept / (1 - self.p)


#: name -> module, and whether the original's runs in place, which its own skip connection sees
ACTIVATIONS: dict[Any, tuple[type[nn.Module], bool]] = {
    None: (nn.Identity, False), "id": (nn.Identity, False), "identity": (nn.Identity, False),
    "linear": (nn.Identity, False), "gelu": (nn.GELU, False), "glu": (nn.GLU, False), "relu": (nn.ReLU, True),
    "silu": (nn.SiLU, True), "swish": (nn.SiLU, True),
}  # fmt: skip


class MLP(nn.Module):
    """Linear layers, activations between and around them.

    ``pre_activation`` (or more activations than layers) puts one activation and the dropout first; each linear is
    followed by an activation while any is left of ``n_activations``, and those left over come last. ``dropout`` above 1
    drops whole channels with probability dropout - 1. ``hidden_dim`` None: output_dim for one layer, else input_dim;
    with one layer it is the output's width. ``layernorm``: before everything; ``skip_connection`` adds its output (or
    the activated one, where a leading relu or silu, in place in the original, overwrote it). ``input_shape`` "bdl":
    (batch, channels, length) comes in. ``average_pool`` "l": mean over the length, kept. Keys ``layers.{i}.*`` count
    every module, ``layernorm.*``.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        activation: str | None = None,
        dropout: float = 0.0,
        layernorm: bool = False,
        n_layers: int = 1,
        n_activations: int = 0,
        pre_activation: bool = False,
        input_shape: str = "bld",
        hidden_dim: int | None = None,
        skip_connection: bool = False,
        average_pool: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(map(str, ACTIVATIONS))}")
        if hidden_dim is None:
            hidden_dim = output_dim if n_layers < 2 else input_dim
        act, in_place = ACTIVATIONS[activation]
        leading = n_activations > n_layers or bool(pre_activation)
        layers: list[nn.Module] = [act(), self._dropout(dropout)] if leading else []
        activations = n_activations - 1 if leading else n_activations
        # As in the original a first linear is made whenever there is anything to make, be it an activation alone.
        for i in range(max(n_layers, activations)):
            if i == 0:
                layers.append(Linear(input_dim, hidden_dim))
            elif i < n_layers:
                layers.append(Linear(hidden_dim, output_dim if i == n_layers - 1 else hidden_dim))
            if i < activations:
                layers.append(act())
        self.layernorm = nn.LayerNorm(input_dim) if layernorm else nn.Identity()
        self.layers = nn.Sequential(*layers)
        self.skip_connection, self.input_shape, self.average_pool = skip_connection, input_shape, average_pool
        self.skips_activated = leading and in_place

    @staticmethod
    def _dropout(p: float) -> nn.Module:
        if p > 1:
            return ChannelDropout(p - 1)
        return nn.Dropout(p) if p > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layernorm(x)
        if self.input_shape == "bdl":
            x = x.transpose(1, 2)
        if self.skip_connection and self.skips_activated:
            x = self.layers[0](x)
            x = self.layers[1:](x) + x
        else:
            x = self.layers(x) + x if self.skip_connection else self.layers(x)
        return x.mean(dim=1, keepdim=True) if self.average_pool == "l" else x


def mlp(config: Config) -> nn.Module:
    """The method "mlp"; any other is the identity."""
    return call_with(MLP, config["kwargs"], "the mlp") if config["method"] == "mlp" else nn.Identity()


class Block(Recomputed):
    """Preprocessing, SSM, MLP; ``skip_connection`` adds the preprocessed input, or with ``skip_preprocess`` the input.

    With a closed-loop SSM (the decoder) only preprocessing and SSM run; the MLP holds weights that are not used.
    """

    def __init__(
        self,
        input_dim: int,
        pre_config: Config,
        ssm_config: Config,
        mlp_config: Config,
        skip_connection: bool = False,
        skip_preprocess: bool = False,
    ) -> None:
        super().__init__()
        kind, method = pre_config["method"], ssm_config["method"]
        if kind not in (*PREPROCESSING, "identity", "none", None):
            raise ValueError(f"preprocessing is {kind!r}; expected {', '.join(PREPROCESSING)} or identity")
        if method not in SSMS:
            raise ValueError(f"the ssm's method is {method!r}; expected one of {', '.join(SSMS)}")
        fixed = PREPROCESSING.get(kind)
        self.pre: nn.Module = (
            nn.Identity() if fixed is None else call_with(fixed, pre_config["kwargs"], f"the preprocessing {kind}")
        )
        self.ssm: Any = call_with(SSMS[method], ssm_config["kwargs"], f"the ssm {method}")
        self.mlp = mlp(mlp_config)
        self.skip_connection, self.skip_preprocess = skip_connection, skip_preprocess

    def finish(self, y: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """What follows the SSM's output y; z and u: the input with and without preprocessing."""
        y = self.mlp(y)
        if not self.skip_connection:
            return y
        return y + (u if self.skip_preprocess else z)

    def forward(self, u: Tensor) -> Tensor:
        z = self.pre(u)
        return self.finish(self.ssm(z), z, u)


class Stack(nn.Module):
    """The encoder's blocks in a row, or the decoder's one block (keys ``blocks.*``)."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks: Any = blocks


@dataclass(frozen=True)
class Predictions:
    """In the transformed scale: the forecast (batch, horizon, d_out); with the open loop also the outputs over the lag
    window (batch, lag, d_out), the predicted next inputs of the last layer and those inputs (batch, lag, D)."""

    y_closed: Tensor
    y_open: Tensor | None = None
    z_pred: Tensor | None = None
    z_true: Tensor | None = None


class SpaceTime(GradCheckpointing, Forecaster):
    """A series in, its next ``horizon`` steps out; the arguments are the original's, see :func:`spacetime`.

    ``data_transform``: how a window is centred, see :func:`zoo_time_series._base.affine_of`. ``horizon`` is no part of
    the weights: ``model(series, horizon=1000)`` rolls out further; nor is ``lag``: other lengths are taken, the window
    that the transform looks at is the first ``lag`` steps. ``inference_only``: the original's switch, for
    :meth:`predictions`.
    """

    any_length = any_horizon = True

    def __init__(
        self,
        embedding_config: Config,
        encoder_config: Config,
        decoder_config: Config,
        output_config: Config,
        inference_only: bool = False,
        lag: int = 1,
        horizon: int = 1,
        data_transform: str = "mean",
    ) -> None:
        super().__init__()
        if data_transform not in TRANSFORMS:
            raise ValueError(f"data_transform is {data_transform!r}; expected one of {', '.join(TRANSFORMS)}")
        for name, value in (("lag", lag), ("horizon", horizon)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.lag, self.horizon, self.data_transform, self.inference_only = lag, horizon, data_transform, inference_only
        self.columns = (embedding_config.get("kwargs") or {}).get("input_dim")
        self.embedding = embedding(embedding_config)
        blocks = [call_with(Block, block, "a block") for block in encoder_config["blocks"]]
        if not blocks or any(isinstance(block.ssm, ClosedLoopCompanionSSM) for block in blocks):
            raise ValueError("the encoder needs one block or more, of a companion or shift ssm without closed loop")
        self.encoder = Stack(nn.Sequential(*blocks))
        # The original skips the decoder's own skip connection, too.
        decoder = call_with(Block, {**decoder_config["blocks"][0], "skip_connection": False}, "the decoder's block")
        if not isinstance(decoder.ssm, ClosedLoopCompanionSSM):
            raise ValueError("the decoder's ssm must be closed_loop_companion or closed_loop_shift")
        decoder.ssm.lag, decoder.ssm.horizon = lag, horizon
        self.decoder = Stack(decoder)
        self.output = mlp(output_config)

    @property
    def unused_parameters(self) -> list[str]:
        """Parameters that exist for the original's sake and do not reach the forecast."""
        ssm = self.decoder.blocks.ssm
        names = ["decoder.blocks.ssm.skip"]
        names += ["decoder.blocks.ssm.k"] if ssm.norm_order <= 0 else []
        names += ["decoder.blocks.mlp."] if any(True for _ in self.decoder.blocks.mlp.parameters()) else []
        for i, block in enumerate(self.encoder.blocks):
            names += [f"encoder.blocks.{i}.pre.ma_window"] if hasattr(block.pre, "ma_window") else []
            names += [] if block.ssm.skip_connection else [f"encoder.blocks.{i}.ssm.skip"]
        return names

    # -- forecasts

    def forward(self, series: Tensor, horizon: int | None = None) -> Tensor:
        """(batch, lag, d_in) to (batch, horizon, d_out), both in the series' own scale.

        Raises ValueError for another number of columns, or an empty series.
        """
        self._check(series)
        affine = affine_of(series, self.data_transform, self.lag)
        return affine.back(self.closed_loop(self.encode(affine(series)), horizon))

    def _check(self, series: Tensor) -> None:
        if series.dim() != 3 or series.shape[1] < 1 or self.columns not in (None, series.shape[2]):
            raise ValueError(
                f"series has shape {tuple(series.shape)}; expected (batch, length of at least 1, {self.columns})"
            )

    def encode(self, u: Tensor) -> Tensor:
        """The transformed window (batch, lag, d_in) through embedding and encoder: (batch, lag, D)."""
        return self.encoder.blocks(self.embedding(u))

    def closed_loop(self, z: Tensor, horizon: int | None = None) -> Tensor:
        """The forecast, still transformed, from the encoder's output."""
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon is {horizon}; expected at least 1")
        decoder = self.decoder.blocks
        state = decoder.ssm.final_state(decoder.pre(z))
        return self.output(decoder.ssm.roll_out(state, horizon or self.horizon).to(z.dtype))

    def predictions(self, u: Tensor, horizon: int | None = None, *, open_loop: bool | None = None) -> Predictions:
        """Everything that the original's forward returns, from the transformed window (batch, lag, d_in).

        ``open_loop``: also over the lag window; default: unless ``inference_only``.
        """
        z = self.encode(u)
        closed = self.closed_loop(z, horizon)
        if self.inference_only if open_loop is None else not open_loop:
            return Predictions(closed)
        decoder = self.decoder.blocks
        y, z_pred = decoder.ssm.open_loop(decoder.pre(z))
        return Predictions(closed, self.output(y), z_pred, z)

    def loss(self, series: Tensor, target: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        """``w0 RMSE(forecast) + w1 RMSE(next step, over the window) + w2 RMSE(next input of the last layer)``.

        series (batch, lag, d_in), target (batch, horizon, d_out). The last two begin where the first encoder block's
        kernel is full; they are left out where the window is shorter than that. (In the original's training they act in
        the first epoch only: it never leaves ``inference_only`` after the first validation. Give (1, 0, 0) for that.)
        """
        affine = affine_of(series, self.data_transform, self.lag)
        first = self.encoder.blocks[0].ssm.kernel_dim
        length = series.shape[1]
        more = length > first and any(weights[1:])
        found = self.predictions(affine(series), target.shape[1], open_loop=more)
        total = weights[0] * rmse(affine.back(found.y_closed), target)
        if more:
            assert found.y_open is not None
            assert found.z_pred is not None
            assert found.z_true is not None
            y = torch.cat([series, target], dim=1)
            total = total + weights[1] * rmse(affine.back(found.y_open)[:, first - 1 :], y[:, first : length + 1])
            total = total + weights[2] * rmse(found.z_pred[:, first - 1 : -1], found.z_true[:, first:])
        return total

    # -- a history as a state of fixed size

    def init_stream(self, history: Tensor) -> dict[str, Any]:
        """The state after ``history`` (batch, length, d_in), in the series' own scale; ``length`` at least 1.

        The transform is that of this history, and stays: what comes later is transformed by it. Then
        ``state = init_stream(x[:, :k])`` and :meth:`observe` of the rest is the state of the whole.
        """
        self._check(history)
        if any(isinstance(b.mlp, MLP) and b.mlp.average_pool == "l" for b in self.encoder.blocks):
            raise ValueError("this model averages over the window in its encoder (average_pool); it cannot be streamed")
        affine = affine_of(history, self.data_transform, self.lag)
        z = self.embedding(affine(history))
        blocks: list[dict[str, Tensor]] = []
        for block in [*self.encoder.blocks, self.decoder.blocks]:
            filtered = block.pre(z)
            state = {"ssm": block.ssm.final_state(filtered)}
            if not isinstance(block.pre, nn.Identity):
                state["pre"] = block.pre.final_state(z)
            blocks.append(state)
            if block is not self.decoder.blocks:
                z = block(z)
        return {"affine": affine, "blocks": blocks}

    def observe(self, x: Tensor, state: dict[str, Any]) -> None:
        """The next step of the series, (batch, d_in); ``state`` moves on in place, at a cost that does not grow."""
        affine: Affine = state["affine"]
        z = self.embedding(affine(x[:, None]))[:, 0]
        for block, held in zip([*self.encoder.blocks, self.decoder.blocks], state["blocks"], strict=True):
            filtered = block.pre.step(z, held["pre"]) if "pre" in held else z
            if block is self.decoder.blocks:
                block.ssm.advance(filtered, held["ssm"])
                return
            y = block.ssm.step(filtered, held["ssm"])
            z = block.finish(y[:, None], filtered[:, None], z[:, None])[:, 0]

    def roll_out(self, state: dict[str, Any], horizon: int | None = None) -> Tensor:
        """The forecast (batch, horizon, d_out) from a state of :meth:`init_stream`, which is left as it is."""
        ssm = self.decoder.blocks.ssm
        y = ssm.roll_out(state["blocks"][-1]["ssm"], horizon or self.horizon)
        return state["affine"].back(self.output(y.to(next(self.parameters()).dtype)))


def rmse(found: Tensor, expected: Tensor) -> Tensor:
    """The root of the mean squared error over everything."""
    return F.mse_loss(found, expected).sqrt()


def spacetime(
    lag: int = 336,
    horizon: int = 720,
    input_dim: int = 1,
    model_dim: int | None = None,
    n_blocks: int = 1,
    kernel_dim: int = 64,
    kind: str = "companion",
    n_kernels: int = 16,
    embedding: str = "repeat",
    preprocessing: str = "residual",
    max_avg_window: int = 64,
    norm_order: int = 1,
    skip: bool = True,
    dropout: float = 0.25,
    data_transform: str = "mean",
) -> SpaceTime:
    """SpaceTime as the original's configuration files and command line build it.

    ``lag``, ``horizon``: steps of history and of the forecast. ``input_dim``: columns that are forecast together.
    ``model_dim``: width, None for 128 a column. ``n_blocks``: counts the decoder (1 and 2: one encoder block, 3: two
    ...). ``kernel_dim``: entries of a state. ``kind``: "companion" or "shift". ``n_kernels``: of the first block,
    shared by heads. ``embedding``: "repeat" or "linear". ``preprocessing``: of the first block: "residual",
    "differencing", "ma_residual" or "identity". ``norm_order``: norm of the companion's column and of the decoder's b,
    c, k. ``skip`` False: no skip connections in the first block (``encoder/default_no_skip``). ``data_transform``:
    "mean", "mean_input", "last", "standardize" or "none".

    Returns a model from (batch, lag, input_dim) to (batch, horizon, input_dim). Source: HazyResearch/spacetime
    ``configs/model/*``, ``setup/configs/model.py``.
    """
    if kind not in ("companion", "shift"):
        raise ValueError(f"kind is {kind!r}; expected 'companion' or 'shift'")
    for name, value in (("input_dim", input_dim), ("model_dim", model_dim), ("kernel_dim", kernel_dim)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    D = model_dim if model_dim is not None else 128 * input_dim
    kernels = 8
    norm = norm_order if kind == "companion" else 0

    def mlp_config(width: int, skips: bool) -> Config:
        arguments = {"input_dim": D, "output_dim": width, "activation": "gelu", "dropout": dropout, "n_activations": 1}
        return {"method": "mlp", "kwargs": {**arguments, "pre_activation": True, "skip_connection": skips}}

    def ssm_config(method: str, count: int, head_dim: int, order: int, skips: bool) -> Config:
        arguments = {"model_dim": D, "n_kernels": count, "kernel_dim": kernel_dim, "head_dim": head_dim}
        return {"method": method, "kwargs": {**arguments, "norm_order": order, "skip_connection": skips}}

    fixed: dict[str, Any] = {"model_dim": D, "head_dim": input_dim}
    if preprocessing == "residual":
        fixed |= {"n_kernels": kernels, "kernel_dim": 2, "max_avg_window": max_avg_window}
    else:
        fixed |= {"n_kernels": kernels, "kernel_dim": 4}
    fixed["kernel_repeat"] = D // (kernels * input_dim)
    identity: Config = {"method": "identity", "kwargs": None}
    first = {
        "input_dim": D,
        "pre_config": identity if preprocessing == "identity" else {"method": preprocessing, "kwargs": fixed},
        "ssm_config": ssm_config(kind, n_kernels, input_dim, norm, skip),
        "mlp_config": mlp_config(D, skip),
        "skip_connection": skip,
    }
    further = {
        "input_dim": D,
        "pre_config": identity,
        "ssm_config": ssm_config(kind, D, 1, norm, True),
        "mlp_config": mlp_config(D, True),
        "skip_connection": True,
        "skip_preprocess": True,
    }
    decoder = {
        "input_dim": D,
        "pre_config": identity,
        "ssm_config": ssm_config(f"closed_loop_{kind}", D, 1, norm_order, False),
        "mlp_config": identity,
    }
    return SpaceTime(
        embedding_config={"method": embedding, "kwargs": {"input_dim": input_dim, "embedding_dim": D}},
        encoder_config={"blocks": [first, *[further] * max(n_blocks - 2, 0)]},
        decoder_config={"blocks": [decoder]},
        output_config=mlp_config(input_dim, False),
        lag=lag,
        horizon=horizon,
        data_transform=data_transform,
    )
