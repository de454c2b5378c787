"""Recurrent cells of ConvRNNs: convolutional gates over (input, state) on maps of one size.

Source: neuroagents-lab/PyTorchTNN ``pt_tnn/recurrent_cells`` (after neuroailab/convrnns); arXiv 2505.18361. A cell's
convolution of (input, state) is computed in two parts, so that the inputs of many time steps can go through theirs in
one product where they are known beforehand (:meth:`Cell.series`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo_kernels import linear_scan

from .convolution import Conv2d, Part, start


def activation(name: str | None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A module of torch.nn by its name ("ReLU"), Identity for None. Raises ValueError for a name torch has not."""
    if name is None:
        return nn.Identity()
    kind = getattr(nn, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"activation is {name!r}; expected the name of a module of torch.nn, as 'ReLU', or None")
    return kind(**(options or {}))


def over_channels(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (batch, channels, height, width); nothing for None."""
    return x if norm is None else norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Cell(nn.Module):
    """A cell's protocol. ``forward(x, state)`` is one time step: (output, new state); a state of None is at rest.

    Subclasses have ``begin(x)``: what depends on the weights alone; ``project(x, begun)``: what depends on the input
    alone; ``update(x, projected, state, begun)``: the rest.
    """

    #: The identity has no state.
    stateful = True

    def begin(self, x: Tensor) -> Any:
        """What a pass over inputs like ``x`` needs of the weights; made once a pass."""
        return None

    def project(self, x: Tensor, begun: Any) -> tuple[Tensor, ...]:
        return ()

    def rest(self, x: Tensor) -> Tensor:
        """The state at rest for inputs like ``x``: zeros."""
        return torch.zeros_like(x)

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, state: Tensor | None = None, begun: Any = None) -> tuple[Tensor, Tensor]:
        begun = self.begin(x) if begun is None else begun
        return self.update(x, self.project(x, begun), self.rest(x) if state is None else state, begun)

    def series(self, x: Tensor, steps: int) -> Tensor:
        """All outputs from rest of inputs that are known: (batch * steps, ...), steps within a row, to the same."""
        begun = self.begin(x)
        projected = [p.unflatten(0, (-1, steps)) for p in self.project(x, begun)]
        x = x.unflatten(0, (-1, steps))
        state, made = self.rest(x[:, 0]), []
        for t in range(steps):
            y, state = self.update(x[:, t], tuple(p[:, t] for p in projected), state, begun)
            made.append(y)
        return torch.stack(made, 1).flatten(0, 1)


class IdentityCell(Cell):
    """No memory: the input is the output."""

    stateful = False

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, state: Tensor | None = None, begun: Any = None) -> tuple[Tensor, Any]:
        return x, state

    def series(self, x: Tensor, steps: int) -> Tensor:
        return x


class TimeDecayCell(Cell):
    """``s' = x + tau s``, output s'. ``tau``: a learnt scalar, or fixed with ``trainable=False``."""

    def __init__(self, channels: int, tau: float = 0.0, trainable: bool = True, init_dict: Any = None) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.tensor(float(tau)), requires_grad=trainable)
        if init_dict is not None:
            options = dict(init_dict)
            getattr(nn.init, options.pop("method"))(self.tau, **options)

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        state = x + self.tau.to(x.dtype) * state
        return state, state

    def series(self, x: Tensor, steps: int) -> Tensor:
        rows = x.reshape(x.shape[0], -1).unflatten(0, (-1, steps))
        h, _ = linear_scan(rows, self.tau.to(rows.dtype).expand(1, 1, rows.shape[-1]))
        return h.flatten(0, 1).view(x.shape)


class _Gated(Cell):
    """Convolutions over (input, state) of one width, zeros around, with LayerNorms of their gates if asked for.

    ``convolutions``: name to (outputs in widths, rule of the parts); ``norms``: names of the LayerNorms.
    """

    convolutions: ClassVar[dict[str, int]]
    norms: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        channels: int,
        ksize: int | Sequence[int],
        *,
        layernorm: bool = False,
        forget_bias: float = 1.0,
        padding: int | str = "same",
        dilation: int = 1,
        use_bias: bool = True,
        bias: float | None = None,
        init_dict: Any = None,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.forget_bias = channels, forget_bias
        for name, widths in self.convolutions.items():
            layer = Conv2d(
                2 * channels, widths * channels, ksize, padding=padding, dilation=dilation, use_bias=use_bias
            )
            start(layer, init_dict, bias)
            setattr(self, name, layer)
        for name in self.norms:
            setattr(self, name, nn.LayerNorm(channels) if layernorm else None)
        self.act = nn.Tanh() if act is None else act

    def begin(self, x: Tensor) -> list[list[Part]]:
        return [getattr(self, name).parts(x, (self.channels, self.channels)) for name in self.convolutions]

    def project(self, x: Tensor, begun: list[list[Part]]) -> tuple[Tensor, ...]:
        return tuple(of_input(x) for of_input, _ in begun)

    def gates(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        found = zip(names, x.chunk(len(names), dim=1), strict=True)
        return [over_channels(getattr(self, name), gate) for name, gate in found]


class IntersectionRNNCell(_Gated):
    """The +RNN of Collins et al. (arXiv 1611.09913): one gate through depth, one through time.

    ``gh, h, gy, y = conv(x, s)``: output ``gy x + (1 - gy) relu(y)``, state ``gh s + (1 - gh) tanh(h)``.
    """

    convolutions: ClassVar[dict[str, int]] = {"conv": 4}
    norms: ClassVar[tuple[str, ...]] = ("ln_gh_act", "ln_h_act", "ln_gy_act", "ln_y_act")

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        gh, h, gy, y = self.gates(begun[0][1](state, add=projected[0]), self.norms)
        gh, gy = torch.sigmoid(gh + self.forget_bias), torch.sigmoid(gy + self.forget_bias)
        return torch.lerp(torch.relu(y), x, gy), torch.lerp(torch.tanh(h), state, gh)


class UGRNNCell(_Gated):
    """``g, c = conv(x, s)``: state and output ``g s + (1 - g) tanh(c)`` (Collins et al., arXiv 1611.09913)."""

    convolutions: ClassVar[dict[str, int]] = {"conv": 2}
    norms: ClassVar[tuple[str, ...]] = ("ln_g_act", "ln_c_act")

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        g, c = self.gates(begun[0][1](state, add=projected[0]), self.norms)
        state = torch.lerp(torch.tanh(c), state, torch.sigmoid(g + self.forget_bias))
        return state, state


class GRUCell(_Gated):
    """``r, u = conv_ru(x, s)``, ``c = act(conv_c(x, r s))``: state and output ``u s + (1 - u) c``; r has the bias."""

    convolutions: ClassVar[dict[str, int]] = {"conv_ru": 2, "conv_c": 1}
    norms: ClassVar[tuple[str, ...]] = ("ln_r_pre", "ln_u_pre", "ln_c_pre")

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        r, u = self.gates(begun[0][1](state, add=projected[0]), self.norms[:2])
        reset = torch.sigmoid(r + self.forget_bias) * state
        (c,) = self.gates(begun[1][1](reset, add=projected[1]), self.norms[2:])
        state = torch.lerp(self.act(c), state, torch.sigmoid(u))
        return state, state


class LSTMCell(_Gated):
    """``i, j, f, o = conv(x, h)``: ``c' = c sigmoid(f + 1) + sigmoid(i) act(j)``, ``h' = act(c') sigmoid(o)``.

    The state is (c, h), one behind the other on the channels. With LayerNorm the normalised c' is what is kept.
    """

    convolutions: ClassVar[dict[str, int]] = {"conv": 4}
    norms: ClassVar[tuple[str, ...]] = ("ln_input", "ln_transform", "ln_forget", "ln_output")

    def __init__(self, channels: int, ksize: int | Sequence[int], **options: Any) -> None:
        super().__init__(channels, ksize, **options)
        self.ln_state = nn.LayerNorm(channels) if options.get("layernorm") else None

    def rest(self, x: Tensor) -> Tensor:
        return torch.zeros_like(torch.cat([x, x], dim=1))

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        c, h = state.chunk(2, dim=1)
        i, j, f, o = self.gates(begun[0][1](h, add=projected[0]), self.norms)
        c = c * torch.sigmoid(f + self.forget_bias) + torch.sigmoid(i) * self.act(j)
        c = over_channels(self.ln_state, c)
        h = self.act(c) * torch.sigmoid(o)
        return h, torch.cat([c, h], dim=1)


class VanillaRNNCell(Cell):
    """``s' = act(norm(conv_input(x) + conv_state(s)))``, output s'. Both convolutions have a bias."""

    def __init__(
        self,
        channels: int,
        ksize: int | Sequence[int],
        *,
        out_channels: int | None = None,
        layernorm: bool = True,
        padding: int | str = "same",
        dilation: int = 1,
        stride: int = 1,
        use_bias: bool = True,
        bias: float | None = None,
        init_dict: Any = None,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = channels if out_channels is None else out_channels
        convolution = {"stride": stride, "padding": padding, "dilation": dilation, "use_bias": use_bias}
        self.conv_input = Conv2d(channels, self.out_channels, ksize, **convolution)  # type: ignore[arg-type]
        self.conv_state = Conv2d(self.out_channels, self.out_channels, ksize, **convolution)  # type: ignore[arg-type]
        for layer in (self.conv_input, self.conv_state):
            start(layer, init_dict, bias)
        self.ln = nn.LayerNorm(self.out_channels) if layernorm else None
        self.act = nn.ELU() if act is None else act

    def begin(self, x: Tensor) -> list[Part]:
        return [self.conv_input.parts(x)[0], self.conv_state.parts(x)[0]]

    def project(self, x: Tensor, begun: list[Part]) -> tuple[Tensor, ...]:
        return (begun[0](x),)

    def rest(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.out_channels, *x.shape[2:])

    def update(self, x: Tensor, projected: tuple[Tensor, ...], state: Tensor, begun: Any) -> tuple[Tensor, Tensor]:
        state = self.act(over_channels(self.ln, begun[1](state, add=projected[0])))
        return state, state


#: The original's names, and which of its arguments each class takes by which of ours.
CELLS: dict[str, type[Cell]] = {
    "IdentityCell": IdentityCell,
    "TimeDecayRecurrentCell": TimeDecayCell,
    "IntersectionRNNCell": IntersectionRNNCell,
    "UGRNNCell": UGRNNCell,
    "GRUCell": GRUCell,
    "LSTMCell": LSTMCell,
    "VanillaRNNCell": VanillaRNNCell,
    "ConvRNNBasicCell": VanillaRNNCell,
}
_GATED = {"ksize", "layernorm", "forget_bias", "padding", "dilation", "use_bias", "bias", "init_dict"}
_KNOWN = {
    "IdentityCell": set(),
    "TimeDecayRecurrentCell": {"tau", "trainable", "init_dict"},
    "VanillaRNNCell": (_GATED - {"forget_bias"}) | {"stride", "out_channels"},
    "ConvRNNBasicCell": {"ksize", "stride", "padding", "out_channels"},
}
#: Taken from the map that arrives, or fixed.
_SHAPES = {"name", "input_in_channels", "out_channels", "state_shape", "stride", "groups", "padding_mode"}


def make_cell(description: Mapping[str, Any], channels: int) -> Cell:
    """A cell for ``channels`` from the original's description {"name": "GRUCell", "ksize": [2, 2], ...}.

    Raises ValueError for a cell, an argument or a value that is not built here, naming it.
    """
    name = description.get("name")
    if name not in CELLS:
        raise ValueError(f"the recurrent cell is {name!r}; expected one of {', '.join(CELLS)}")
    for key, only in (("stride", (1, [1, 1], (1, 1))), ("groups", (1,)), ("padding_mode", ("zeros",))):
        if description.get(key, only[0]) not in only and not (key == "stride" and name == "ConvRNNBasicCell"):
            raise ValueError(f"{name}: {key} is {description[key]!r}; a cell keeps the map's size, {key} = {only[0]!r}")
    known = set(_KNOWN.get(name, _GATED))
    switched = {"activation", "activation_func_kwargs"}
    if name in ("GRUCell", "LSTMCell", "VanillaRNNCell", "ConvRNNBasicCell"):
        known |= switched
    unknown = sorted(set(description) - known - _SHAPES)
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")
    width = description.get("out_channels")
    if width not in (None, channels) and "out_channels" not in known and known:
        raise ValueError(f"{name}: out_channels is {width}, its input has {channels} channels; expected the same")
    options = {k: v for k, v in description.items() if k in known - switched}
    if "activation" in description and "activation" in known:
        options["act"] = activation(description["activation"], description.get("activation_func_kwargs"))
    if name == "ConvRNNBasicCell":
        options = {"ksize": (3, 3), "padding": 0, "act": nn.ReLU(), "layernorm": False} | options
    return CELLS[name](channels, **options)
