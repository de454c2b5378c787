"""Encoders: frames of forces and torques (batch, time, channels, height, width) to features (batch, time, repr_dim).

Source: neuroagents-lab/2025-tactile-whisking ``enc_att_dec/encoder``; arXiv 2505.18361.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo.layers.linear import Linear

from .graph import TemporalGraph
from .published import with_output_width, zhuang_graph
from .sequence import MambaStack, Mids, S4Stack, State, at


def _flat(x: Tensor) -> Tensor:
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, time, channels, height, width)")
    return x.flatten(2)


class GraphEncoder(nn.Module):
    """A ConvRNN: a :class:`~zoo_neuro.tactile.graph.TemporalGraph`, its output node ``repr_dim`` wide.

    ``graph``: a description, or None for the published one with ``cell``, ``layernorm``, ``widths``, ``hidden`` (see
    :func:`~zoo_neuro.tactile.published.zhuang_graph`). ``image_off``: frames after which a still picture (or the given
    sequence) is replaced by a blank of 0.5, the original's MakeMovie.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        n_times: int,
        repr_dim: int,
        *,
        graph: Mapping[str, Any] | None = None,
        full_unroll: bool = False,
        return_all: bool = True,
        image_off: int | None = None,
        **published: Any,
    ) -> None:
        super().__init__()
        if graph is None:
            graph = zhuang_graph(repr_dim=repr_dim, **published)
        elif published:
            raise ValueError(f"graph and {', '.join(published)} are given; expected one of them")
        graph = with_output_width(graph, repr_dim)
        self.graph = TemporalGraph(graph, input_shape, n_times, full_unroll, return_all)
        self.n_times, self.image_off = n_times, image_off
        self.return_all = return_all

    def _movie(self, x: Tensor) -> Tensor:
        if self.image_off is None:
            return x
        if x.dim() == 4:
            x = x[:, None].expand(-1, self.n_times, -1, -1, -1)
        late = torch.arange(x.shape[1], device=x.device) >= self.image_off
        return x.masked_fill(late[None, :, None, None, None], 0.5)

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        if mids is None:
            return self.graph(self._movie(x), steps)
        nodes: dict[int, dict[str, Tensor]] = {}
        y = self.graph(self._movie(x), steps, nodes)
        mids.update({f"t{t}_{name}": value for t, found in nodes.items() for name, value in found.items()})
        return y

    def init_state(self, batch: int) -> State:
        return self.graph.init_state(batch)

    def step(self, frame: Tensor, state: State) -> Tensor:
        if self.image_off is not None and state["time"] >= self.image_off:
            frame = torch.full_like(frame, 0.5)
        return self.graph.step(frame, state)


class StridedConv(nn.Conv2d):
    """A 3 x 3 convolution with a stride, which a map one position wide does not need.

    With it, oneDNN leaves the weight's gradient in bfloat16 unwritten (torch 2.15 on a CPU).
    """

    def forward(self, x: Tensor) -> Tensor:
        stride = (self.stride[0], 1) if x.shape[3] == 1 else self.stride
        return F.conv2d(x, self.weight, self.bias, stride, self.padding)


class BasicBlock(Recomputed):
    """Two 3 x 3 convolutions beside the identity or a 1 x 1 convolution (He et al., arXiv 1512.03385)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = StridedConv(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18Encoder(nn.Module):
    """ResNet-18 over each frame alone, under torchvision's names; ``width``: channels of the first stage."""

    def __init__(self, input_shape: Sequence[int], n_times: int, repr_dim: int, *, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i in range(4):
            stage = [BasicBlock(width << max(i - 1, 0), width << i, 1 + (i > 0)), BasicBlock(width << i, width << i, 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = Linear(8 * width, repr_dim)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer is not self.conv1:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def frames(self, x: Tensor, mids: Mids | None = None) -> Tensor:
        """(frames, channels, height, width) to (frames, repr_dim)."""
        keep: Mids = {} if mids is None else mids
        keep["relu"] = F.relu(self.bn1(self.conv1(x)))
        x = keep["maxpool"] = F.max_pool2d(keep["relu"], 3, 2, 1)
        for i in range(1, 5):
            for j, block in enumerate(getattr(self, f"layer{i}")):
                x = keep[f"layer{i}.{j}"] = block(x)
        keep["avgpool"] = x.mean((2, 3), keepdim=True)
        keep["fc"] = self.fc(keep["avgpool"].flatten(1))
        return keep["fc"]

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        """One frame (batch, channels, height, width) gives (batch, repr_dim)."""
        if x.dim() == 4:
            return self.frames(x, mids)
        x = at(x, steps)
        return self.frames(x.flatten(0, 1), mids).unflatten(0, x.shape[:2])

    def init_state(self, batch: int) -> State:
        return {}

    def step(self, frame: Tensor, state: State) -> Tensor:
        return self.frames(frame)


class LinearEncoder(nn.Module):
    """One linear layer on each flattened frame or, with ``whole``, on the flattened recording: (batch, repr_dim)."""

    def __init__(self, input_shape: Sequence[int], n_times: int, repr_dim: int, *, whole: bool = False) -> None:
        super().__init__()
        self.return_all = not whole
        self.lin = Linear(torch.Size(input_shape).numel() * (n_times if whole else 1), repr_dim)

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        x = _flat(x)
        if not self.return_all and x[0].numel() != self.lin.in_features:
            raise ValueError(
                f"x has {x[0].numel()} numbers; expected {self.lin.in_features}: another number of frames?"
            )
        y = self.lin(at(x, steps) if self.return_all else x.flatten(1))
        if mids is not None:
            mids["enc_flat_enc"] = y
        return y

    def init_state(self, batch: int) -> State:
        if not self.return_all:
            raise ValueError("a linear encoder of the whole recording has no steps; expected whole = false")
        return {}

    def step(self, frame: Tensor, state: State) -> Tensor:
        return self.lin(frame.flatten(1))


class _Embedded(nn.Module):
    """Flatten, linear, a stack over time, linear."""

    name: str
    stack: nn.Module

    def _ends(self, input_shape: Sequence[int], model_dim: int, repr_dim: int) -> None:
        self.embed = Linear(torch.Size(input_shape).numel(), model_dim)
        self.decoder = Linear(model_dim, repr_dim)

    def forward(self, x: Tensor, steps: Sequence[int] | None = None, mids: Mids | None = None) -> Tensor:
        x = self.embed(_flat(x))
        if mids is not None:
            mids[f"{self.name}_emb"] = x
        y = self.decoder(self.stack(x, steps, mids))
        if mids is not None:
            mids[f"{self.name}_dec"] = y
        return y

    def init_state(self, batch: int) -> State:
        return self.stack.init_state(batch)  # type: ignore[operator, no-any-return]

    def step(self, frame: Tensor, state: State) -> Tensor:
        return self.decoder(self.stack.step(self.embed(frame.flatten(1)), state))  # type: ignore[operator]


class S4Encoder(_Embedded):
    """A linear layer on each flattened frame, :class:`~zoo_neuro.tactile.sequence.S4Stack`, a linear layer."""

    name = "enc_s4"

    def __init__(
        self,
        input_shape: Sequence[int],
        n_times: int,
        repr_dim: int,
        *,
        model_dim: int = 512,
        nlayers: int = 4,
        dropout: float = 0.2,
        prenorm: bool = False,
    ) -> None:
        super().__init__()
        self._ends(input_shape, model_dim, repr_dim)
        self.stack = S4Stack(model_dim, nlayers, dropout, prenorm, name=self.name)


class MambaEncoder(_Embedded):
    """A linear layer on each flattened frame, :class:`~zoo_neuro.tactile.sequence.MambaStack`, a linear layer."""

    name = "enc_mamba"

    def __init__(
        self,
        input_shape: Sequence[int],
        n_times: int,
        repr_dim: int,
        *,
        model_dim: int = 512,
        nlayers: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        self._ends(input_shape, model_dim, repr_dim)
        self.stack = MambaStack(model_dim, nlayers, **options, name=self.name)


ENCODERS: dict[str, type[nn.Module]] = {
    "graph": GraphEncoder,
    "resnet18": ResNet18Encoder,
    "s4": S4Encoder,
    "mamba": MambaEncoder,
    "linear": LinearEncoder,
}
