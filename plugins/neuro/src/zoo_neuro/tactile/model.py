"""Encoder-attender-decoder networks: a recording of whiskers to the category of what they touched.

Paper: "Task-Optimized Convolutional Recurrent Networks Align with Tactile Processing in the Rodent Brain",
arXiv 2505.18361. Original: neuroagents-lab/2025-tactile-whisking @ 3420db6 (MIT) with neuroagents-lab/PyTorchTNN.
Differs: only what reaches the time steps that the decoder reads is computed (the same numbers).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.adapting import NewHead
from zoo.layers import GradCheckpointing

from .encoders import ENCODERS, GraphEncoder
from .nodes import FullyConnected
from .recordings import VALUES
from .sequence import GPTAttender, MambaStack, Mids, S4Stack, at

ATTENDERS = ("none", "gpt", "mamba", "s4")


class Decoder(nn.Module):
    """Features of the time ``steps`` side by side, and the linear layers before the last: (batch, time, dim) to
    (batch, features).

    ``steps``: indices (negative: from the end), or "all" (or None) of the ``n_times``. ``flat``: the features are of
    one step, (batch, dim). ``activation`` follows each of the ``widths``.
    """

    def __init__(
        self,
        dim: int,
        n_times: int,
        widths: Sequence[int] = (),
        steps: Sequence[int] | str | None = (-1,),
        activation: str | None = "ReLU",
        dropout: float = 0.0,
        batchnorm: Any = None,
        use_bias: bool = True,
        bias: float | None = None,
        init_dict: Any = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(steps, str) and steps != "all":
            raise ValueError(f"steps is {steps!r}; expected 'all' or a list of time steps")
        self.steps = None if steps is None or isinstance(steps, str) else [int(t) for t in steps]
        self.options = {
            "dropout": dropout, "batchnorm": batchnorm, "use_bias": use_bias, "bias": bias, "init_dict": init_dict,
        }  # fmt: skip
        self.in_features = dim if flat else dim * (n_times if self.steps is None else len(self.steps))
        self.mlp = nn.ModuleList()
        for width in widths:
            self.mlp.append(self.layer(width, activation))

    def layer(self, width: int, activation: str | None = None) -> FullyConnected:
        """A layer behind the present ones."""
        return FullyConnected((self.out_features,), None, width, activation_name=activation, **self.options)

    @property
    def out_features(self) -> int:
        return self.mlp[-1].out_shape[0] if len(self.mlp) else self.in_features  # type: ignore[union-attr, index, return-value]

    def wanted(self, time: int) -> list[int] | None:
        """The steps as indices from the start; None for all. Raises ValueError for one that is not there."""
        if self.steps is None:
            return None
        if any(not -time <= t < time for t in self.steps):
            raise ValueError(f"the decoder reads the time steps {self.steps}, but there are {time}")
        return [t % time for t in self.steps]

    def forward(self, x: Tensor, mids: Mids | None = None) -> Tensor:
        """The features of the steps that are read, (batch, steps, dim) or (batch, dim)."""
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(
                f"the decoder reads {self.in_features} features, and there are {x.shape[1]}; expected as many time "
                "steps as the model was built for (n_times)"
            )
        for i, layer in enumerate(self.mlp):
            x = layer(x)
            if mids is not None:
                mids[f"dec_mlp_l{i}"] = x
        return x


def _checked(kind: type[nn.Module], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` if the class takes them; ValueError names one that it does not."""
    parameters = inspect.signature(kind).parameters
    taken = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(taken) == len(parameters):
        for key in options:
            if key not in taken:
                raise ValueError(f"{name} takes no {key!r}; expected {', '.join(taken)}")
    return dict(options)


class TactileNetwork(GradCheckpointing, nn.Module):
    """An encoder of frames, an attender over time, a decoder of categories.

    Arguments: ``encoder`` {"name": "graph" | "resnet18" | "s4" | "mamba" | "linear", further arguments of
    :mod:`zoo_neuro.tactile.encoders`}; ``attender`` {"name": "none" | "gpt" | "mamba" | "s4", ...} of
    :mod:`zoo_neuro.tactile.sequence`; ``decoder``: arguments of :class:`Decoder`; ``num_classes``
    (0: no last layer); ``input_shape`` (channels, height, width) and number ``n_times`` of frames;
    ``repr_dim`` of the encoder's features, ``hidden_dim`` of a GPT's; ``scale`` (six factors of forces and torques) and
    ``compress`` (the inverse hyperbolic sine) of what is read, which the original's networks have not.

    forward: (batch, time, channels, height, width), forces and torques as
    :func:`zoo_neuro.tactile.recordings.to_frames` arranges them, to (batch, num_classes) logits.
    Raises ValueError for other shapes.
    Source: arXiv 2505.18361; neuroagents-lab/2025-tactile-whisking ``enc_att_dec/model.py``.
    """

    ends: ClassVar[dict[str, NewHead]] = {"num_classes": NewHead("head")}

    def __init__(
        self,
        encoder: Mapping[str, Any] | str = "graph",
        attender: Mapping[str, Any] | str = "none",
        decoder: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] = (30, 5, 7),
        n_times: int = 22,
        repr_dim: int = 512,
        hidden_dim: int = 512,
        num_classes: int = 117,
        scale: Sequence[float] | None = None,
        compress: bool = False,
    ) -> None:
        super().__init__()
        if scale is not None and (len(scale) != VALUES or input_shape[0] % VALUES):
            raise ValueError(f"scale is {list(scale)}; expected {VALUES} factors, for three forces and three torques")
        self.scale, self.compress = scale, compress
        described = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
        kind = described.pop("name", "graph")
        if kind not in ENCODERS:
            raise ValueError(f"the encoder is {kind!r}; expected one of {', '.join(ENCODERS)}")
        self.input_shape, self.n_times = tuple(int(n) for n in input_shape), n_times
        self.encoder = ENCODERS[kind](
            self.input_shape, n_times, repr_dim, **_checked(ENCODERS[kind], f"the encoder {kind}", described)
        )
        described = {"name": attender} if isinstance(attender, str) else dict(attender)
        kind = described.pop("name", "none")
        self.attends = kind != "none"
        width, times = repr_dim, n_times
        self.attender: nn.Module = nn.Identity()
        if kind == "gpt":
            described = _checked(GPTAttender, "the attender gpt", described)
            self.attender = GPTAttender(repr_dim, hidden_dim, **described)
            width, times = hidden_dim, n_times // self.attender.every
        elif kind == "mamba":
            self.attender = MambaStack(repr_dim, **_checked(MambaStack, "mamba", described), name="att_mamba")
        elif kind == "s4":
            self.attender = S4Stack(repr_dim, **_checked(S4Stack, "s4", described), name="att_s4")
        elif self.attends or described:
            raise ValueError(f"the attender is {kind!r} {described or ''}; expected one of {', '.join(ATTENDERS)}")
        flat = not getattr(self.encoder, "return_all", True)
        if flat and self.attends:
            raise ValueError(
                "the encoder gives its last step alone (return_all = false); an attender reads all of them"
            )
        self.decoder = Decoder(width, times, flat=flat, **_checked(Decoder, "the decoder", decoder or {}))
        self.num_features = self.decoder.out_features
        self.head: nn.Module
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for ``num_classes`` categories (0: none), on the model's device and dtype."""
        self.num_classes = num_classes
        like = next(self.parameters())
        head = self.decoder.layer(num_classes) if num_classes else nn.Identity()
        self.head = head.to(device=like.device, dtype=like.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        """Frames as the encoder reads them: times ``scale``, compressed."""
        if self.scale is not None:
            factors = torch.tensor(self.scale, dtype=x.dtype, device=x.device).repeat(self.input_shape[0] // VALUES)
            x = x * factors[:, None, None]
        return torch.asinh(x) if self.compress else x

    def features(self, x: Tensor, mids: Mids | None = None, steps: Sequence[int] | None = None) -> Tensor:
        """What the attender (or, without one, the encoder) gives: (batch, time, width), of ``steps`` alone if given.

        mids: filled with "encoder", "attender" and their intermediates; all steps are computed then.
        """
        if x.dim() not in (4, 5) or tuple(x.shape[-3:]) != self.input_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch, time, {', '.join(map(str, self.input_shape))})"
            )
        y = self.encoder(self.scaled(x), None if self.attends else steps, mids)
        if mids is not None:
            mids["encoder"] = y
        if self.attends:
            y = self.attender(y, steps, mids)
        if mids is not None:
            mids["attender"] = y
        return y

    def _steps(self, time: int) -> list[int] | None:
        if isinstance(self.attender, GPTAttender):
            time //= self.attender.every
        return self.decoder.wanted(time)

    def forward_features(self, x: Tensor, mids: Mids | None = None) -> Tensor:
        """What the last layer reads, (batch, num_features)."""
        whole = x.dim() == 4 and not isinstance(self.encoder, GraphEncoder)  # frames without time
        steps = None if whole else self._steps(self.n_times if x.dim() == 4 else x.shape[1])
        if not getattr(self.encoder, "return_all", True):
            steps = None
        if mids is None:
            return self.decoder(self.features(x, steps=steps))
        y = self.features(x, mids)
        return self.decoder(y if whole or y.dim() == 2 else at(y, steps), mids)

    def forward(self, x: Tensor, mids: Mids | None = None) -> Tensor:
        logits: Tensor = self.head(self.forward_features(x, mids))
        if mids is not None and self.num_classes:
            mids[f"dec_mlp_l{len(self.decoder.mlp)}"] = logits
        return logits
