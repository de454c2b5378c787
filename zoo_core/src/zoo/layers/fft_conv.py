"""The S4 block: a long convolution with a state-space kernel, then a pointwise gated output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import kernel_spectrum, long_conv

from .checkpointing import Recomputed
from .conv_kernels import EMAKernel, FreeKernel
from .dense_kernel import DenseKernel, RealKernel
from .linear import Linear
from .precision import outside_autocast
from .s4 import S4Kernel
from .s4d import S4DKernel
from .ssm_kernel import ConvolutionKernel, wide

State = dict[str, Tensor]

#: The original's names of kernels ("mode") and ours.
KERNELS: dict[str, type[ConvolutionKernel]] = {
    "s4": S4Kernel, "dplr": S4Kernel, "nplr": S4Kernel, "s4d": S4DKernel, "diag": S4DKernel, "conv": FreeKernel,
    "ema": EMAKernel, "dense": DenseKernel, "slow": DenseKernel, "real": RealKernel,
}  # fmt: skip


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Laplace(nn.Module):
    """The normal distribution function at deviation 0.282095 about 0.707107 (Ma et al., "Mega", equation 12)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


class Gated(nn.Module):
    """The first half of the last axis times ``gate`` of the second."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * self.gate(gate)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU, "swish": nn.SiLU, "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid, "softplus": nn.Softplus, "sqrelu": SquaredReLU, "relu2": SquaredReLU, "laplace": Laplace,
}  # fmt: skip


def activation(name: str | None) -> nn.Module:
    """A pointwise activation, or "glu" over the last axis (first half value, second half gate); "glu-gelu": the gate
    under that activation instead of the sigmoid."""
    if name in (None, "id", "identity", "linear", "none"):
        return nn.Identity()
    if name == "glu":
        return nn.GLU(dim=-1)
    if name.startswith("glu-"):
        return Gated(activation(name.removeprefix("glu-")))
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation is {name!r}; expected None, id, glu, glu-<activation> or one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]()


def widens(act: str | None) -> bool:
    """Whether the activation halves the width, so that what precedes it is twice as wide."""
    return act is not None and act.startswith("glu")


class TiedDropout(nn.Module):
    """Dropout with one mask for all positions (axes between batch and channels)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1]), self.p)


def dropout(p: float, tie: bool = False) -> nn.Module:
    if p <= 0:
        return nn.Identity()
    return TiedDropout(p) if tie else nn.Dropout(p)


class NormedLinear(nn.Module):
    """A linear map whose rows are ``weight_g[i] * weight_v[i] / |weight_v[i]|``: direction and length apart. Keys
    ``weight_g`` (out, 1), ``weight_v`` (out, in), ``bias``."""

    def __init__(self, d_input: int, d_output: int, *, device=None, dtype=None) -> None:
        super().__init__()
        made = nn.Linear(d_input, d_output, device=device, dtype=dtype)
        self.weight_g = nn.Parameter(made.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = nn.Parameter(made.weight.detach().clone())
        self.bias = made.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, weight, self.bias)


class ActivatedLinear(nn.Sequential):
    """Linear, then an activation; "glu" and "glu-..." double the width of the linear. Keys ``0.weight``, ``0.bias``;
    with ``weight_norm`` those of :class:`NormedLinear`."""

    def __init__(
        self, d_input: int, d_output: int, act: str | None, *, weight_norm: bool = False, device=None, dtype=None
    ) -> None:
        width = 2 * d_output if widens(act) else d_output
        made = (NormedLinear if weight_norm else Linear)(d_input, width, device=device, dtype=dtype)
        super().__init__(made, activation(act))


class FFTConv(nn.Module):
    """Convolution of every channel with its kernel, ``y = K * x + D x``, by FFT or step by step.

    ``mode``: "s4" (dplr, nplr), "s4d" (diag), "conv" (free taps), "ema", "dense", "real" (both with a dense state
    matrix, for comparison); further arguments go to the kernel.
    ``channels``: outputs of each input channel, flattened as (channel, d_model), or (d_model, channel) with
    ``swap_channels``. ``bidirectional``: a second set of kernels meets the future; as in the original the present
    belongs to the first. ``l_max``: longest kernel. ``act``: activation after it; "glu" doubles channels before it.

    Parameters: ``D`` (channels, d_model), ``kernel.*``. Source: state-spaces/s4 ``FFTConv``.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int | None = None,
        channels: int = 1,
        *,
        mode: str = "dplr",
        swap_channels: bool = False,
        bidirectional: bool = False,
        act: str | None = None,
        dropout_p: float = 0.0,
        tie_dropout: bool = False,
        drop_kernel: float = 0.0,
        device=None,
        dtype=None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        if mode not in KERNELS:
            raise ValueError(f"kernel mode is {mode!r}; expected one of {', '.join(KERNELS)}")
        kind = {"device": device, "dtype": dtype}
        self.d_model, self.l_max, self.channels = d_model, l_max, channels
        self.bidirectional, self.swap_channels = bidirectional, swap_channels
        outputs = 2 * channels if widens(act) else channels
        self.D = nn.Parameter(torch.randn(outputs, d_model, **kind))
        self.kernel = KERNELS[mode](d_model, 2 * outputs if bidirectional else outputs, l_max, **kernel, **kind)
        self.drop = dropout(dropout_p, tie_dropout)
        self.drop_kernel = nn.Dropout(drop_kernel) if drop_kernel > 0 else nn.Identity()
        self.act = activation(act)

    def kernels(self, length: int, rate: float = 1.0) -> Tensor:
        """The convolution kernels (channels [times 2 if bidirectional], d_model, taps) for an input of ``length``."""
        taps = length if self.l_max is None else min(length, round(self.l_max / rate))
        return self.kernel(taps, rate)[0]

    def forward(self, x: Tensor, *, state: State | None = None, rate: float = 1.0) -> Tensor:
        """(batch, length, d_model) to (batch, length, channels * d_model).

        state (of :meth:`init_state`): continue from it, and leave it at the end of this piece. rate: relative sampling
        step, for inputs sampled ``rate`` times as coarsely as the model was trained on.
        """
        length = x.shape[1]
        taps = length if self.l_max is None else min(length, round(self.l_max / rate))
        with outside_autocast(x):
            y = self._convolved(x, rate, taps) if state is None else self._continued(x, state, rate, taps)
        return self._finished(y)

    def _convolved(self, x: Tensor, rate: float, taps: int) -> Tensor:
        """(batch, length, channels, d_model), from rest."""
        length = x.shape[1]
        if not self.kernel.has_length(taps, rate):
            return self._wrapped(x, self.drop_kernel(self.kernel(taps, rate)[0]), taps)
        if isinstance(self.drop_kernel, nn.Identity):
            # The transform of a kernel that does not change is kept, too.
            k = self.kernel.kept((length, rate), lambda: self._spectrum(taps, rate, length))
        else:
            k = self.drop_kernel(self.kernel(taps, rate)[0])
        if isinstance(k, Tensor):
            k, back = k.chunk(2) if self.bidirectional else (k, None)  # type: ignore[assignment]
            return long_conv(x, k, self.D, back_kernel=back)[0]
        return long_conv(x, k, self.D)[0]

    def _continued(self, x: Tensor, state: State, rate: float, taps: int) -> Tensor:
        """As :meth:`_convolved`, from a carried state."""
        length, before = x.shape[1], state["ssm"]
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no state to continue from; state must be None")
        if taps < length:
            raise ValueError(
                f"x has {length} positions and the kernel {taps} (l_max {self.l_max}, rate {rate:g}); pieces that "
                f"continue from a state may have at most {taps}"
            )
        if self.kernel.remembers():
            k = self.kernel.kept((length, rate), lambda: self._spectrum(taps, rate, length))
            extra = self.kernel.response(before, taps, rate)
        else:  # both at once
            k, extra = self.kernel(taps, rate, before)
        y, _ = long_conv(x, k, self.D)
        state["ssm"] = self.kernel.final_state(x, before, rate).detach()
        return y + torch.movedim(extra, -1, 1).to(y.dtype)

    def _finished(self, y: Tensor) -> Tensor:
        """(batch, length, channels, d_model) to the output."""
        y = y.transpose(-1, -2) if self.swap_channels else y
        return self.act(self.drop(y.flatten(2)))

    def _spectrum(self, taps: int, rate: float, length: int) -> Any:
        k = self.kernel(taps, rate)[0]
        if not self.kernel.remembers():
            return k
        k, back = k.chunk(2) if self.bidirectional else (k, None)
        return kernel_spectrum(k, length, back_kernel=back)

    def _wrapped(self, x: Tensor, k: Tensor, taps: int) -> Tensor:
        """A kernel of another length than ``taps``: the original's transform of length + taps points wraps it."""
        length = x.shape[1]
        n = taps + length
        if self.bidirectional:
            k, back = k.chunk(2)
            k = F.pad(k, (0, length)) + F.pad(back.flip(-1), (length, 0))
        f = torch.fft.rfft(wide(x).transpose(1, 2), n=n)[:, None] * torch.fft.rfft(wide(k), n=n)
        y = torch.movedim(torch.fft.irfft(f, n=n)[..., :length], -1, 1)
        return (y + x[:, :, None] * self.D).to(x.dtype)

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        """A state at rest."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot step; it has no state")
        return {"ssm": self.kernel.init_state(batch, device=device, dtype=dtype)}

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, d_model) to (batch, channels * d_model); ``state`` is updated in place."""
        with outside_autocast(x):
            y = self.kernel.step(x, state["ssm"]) + x[:, None] * self.D
        return self.act(y.to(x.dtype).flatten(1))


class S4Block(Recomputed):
    """``output_linear(drop(mult_act(act(K * x + D x))))``: the layer that S4, S4D and DSS models are stacked of.

    ``final_act``: activation of the output linear ("glu": its width is doubled), None: no output linear at all.
    ``act``: activation between; ``weight_norm``: of the output linear; ``input_linear``: a linear before all else (the
    original's ``bottleneck=1``). Further arguments go to :class:`FFTConv`. Keys ``layer.D``, ``layer.kernel.*``,
    ``output_linear.0.{weight,bias}``. Source: Gu et al., arXiv 2111.00396; state-spaces/s4 ``S4Block``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        act: str | None = "gelu",
        mult_act: str | None = None,
        final_act: str | None = "glu",
        dropout_p: float = 0.0,
        tie_dropout: bool = False,
        inner_tie_dropout: bool = False,
        weight_norm: bool = False,
        input_linear: bool = False,
        device=None,
        dtype=None,
        **layer: Any,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.input_linear: nn.Module = nn.Identity()
        if input_linear:
            self.input_linear = (NormedLinear if weight_norm else Linear)(d_model, d_model, **kind)
        self.layer = FFTConv(d_model, act=act, dropout_p=dropout_p, tie_dropout=inner_tie_dropout, **layer, **kind)
        self.mult_act = activation(mult_act)
        self.drop = dropout(dropout_p, tie_dropout)
        self.output_linear: nn.Module = nn.Identity()
        if final_act is not None:
            width = d_model * self.layer.channels
            self.output_linear = ActivatedLinear(width, d_model, final_act, weight_norm=weight_norm, **kind)

    def forward(
        self, x: Tensor, *, state: State | None = None, rate: float = 1.0, lengths: Tensor | int | None = None
    ) -> Tensor:
        """(batch, length, d_model) to the same. lengths: inputs at and beyond them count as zeros. Others: FFTConv."""
        if lengths is not None:
            ends = torch.as_tensor(lengths, device=x.device).reshape(-1, 1, 1)
            x = x.masked_fill(torch.arange(x.shape[1], device=x.device)[None, :, None] >= ends, 0)
        return self._pointwise(self.layer(self.input_linear(x), state=state, rate=rate))

    def _pointwise(self, y: Tensor) -> Tensor:
        return self.output_linear(self.drop(self.mult_act(y)))

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        return self.layer.init_state(batch, device=device, dtype=dtype)

    def step(self, x: Tensor, state: State) -> Tensor:
        """(batch, d_model) to the same; ``state`` is updated in place."""
        return self._pointwise(self.layer.step(self.input_linear(x), state))
