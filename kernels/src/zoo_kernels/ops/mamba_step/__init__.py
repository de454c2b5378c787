"""One decoding step of a whole stack of Mamba or Mamba-2 blocks for one text: embedding, blocks, last norm, head.

No operator of ``torch.library``: it has dozens of arguments that do not change between calls, so they are collected
once, in a :class:`MambaStep`, and a step is one native call. Nothing here is traced or differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_kernels import _backends, _native

NAME = "mamba_step"
#: How weight matrices may be stored.
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix ``weight`` (out, features), contiguous; int8 with ``scale`` (out,), float32; ``bias`` (out,)."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Matrix:
        """``weight`` stored as ``dtype``: the same memory where nothing changes. int8: symmetric, a factor a row."""
        if dtype not in WEIGHTS:
            raise ValueError(f"{NAME}: weights are {dtype}; they can be stored as {', '.join(map(str, WEIGHTS))}")
        weight = weight.detach()
        bias = None if bias is None else bias.detach().float().contiguous()
        if dtype != torch.int8:
            return cls(weight.to(dtype).contiguous(), None, bias)
        scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
        return cls((weight.float() / scale[:, None]).round().to(torch.int8).contiguous(), scale.contiguous(), bias)

    def dense(self) -> Tensor:
        """The matrix in float32."""
        return self.weight.float() if self.scale is None else self.weight.float() * self.scale[:, None]


@dataclass(frozen=True)
class MambaBlock:
    """``x + out_proj(mixer(norm(x)))``; small tensors are float32, contiguous.

    Both kinds: ``norm`` (D), ``in_proj``, ``out_proj``, ``conv`` (W, channels), ``conv_bias`` (channels), ``skip`` (E).
    Mamba (``heads`` 0): in_proj gives [x, z]; ``x_proj`` [dt, B, C]; ``dt_proj`` (E, R) with dt's bias; ``A`` (E, N).
    Mamba-2: in_proj gives [z, x, B, C, dt]; ``A``, ``dt_bias`` (H); ``gate_norm`` (E) or None, over ``groups`` groups.
    """

    norm: Tensor
    norm_eps: float
    in_proj: Matrix
    out_proj: Matrix
    conv: Tensor
    conv_bias: Tensor | None
    A: Tensor
    skip: Tensor
    states: int
    x_proj: Matrix | None = None
    dt_proj: Matrix | None = None
    heads: int = 0
    groups: int = 1
    dt_bias: Tensor | None = None
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    gate_norm: Tensor | None = None
    gate_eps: float = 1e-5
    norm_before_gate: bool = False

    @property
    def inner(self) -> int:
        return self.out_proj.weight.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.dt_proj is None else self.dt_proj.weight.shape[1]


class MambaStep:
    """``step(token, states)`` moves a text on by one token and gives the next token's logits.

    blocks: one or more :class:`MambaBlock`; embedding: (vocabulary, D) float32, bfloat16 or float16, contiguous; norm:
    (D) float32 and ``eps``, the last RMS norm; head: (vocabulary, D). Matrices are read as they are stored, once a
    step; all else is float32. Everything lies on the CPU.

    Source: the recurrences of :func:`zoo_kernels.selective_scan_step` and :func:`zoo_kernels.ssd_step`, fused.
    """

    def __init__(self, blocks: Sequence[MambaBlock], embedding: Tensor, norm: Tensor, eps: float, head: Matrix) -> None:
        self.blocks, self.embedding, self.norm, self.eps, self.head = list(blocks), embedding, norm, eps, head
        for where, tensor in self._tensors():
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(f"{NAME}: {where} is on {tensor.device}; every tensor must lie contiguous on the CPU")
        self._native = None
        reason = unavailable()
        if reason is not None:
            _backends.passed_over(NAME, "native", reason)
        else:
            from .native import Program

            self._native = Program(self)

    def _tensors(self):
        yield "embedding", self.embedding
        yield "norm", self.norm
        yield "head", self.head.weight
        for i, block in enumerate(self.blocks):
            for name, value in vars(block).items():
                parts = vars(value).items() if isinstance(value, Matrix) else [("", value)]
                yield from ((f"blocks[{i}].{name} {part}", t) for part, t in parts if isinstance(t, Tensor))

    @property
    def backend(self) -> str:
        """What a step runs on now: "native" or "reference"."""
        return "reference" if self._native is None or _backends.forced() == "reference" else "native"

    def __call__(self, token: int, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits (vocabulary,) float32 after ``token``; ``states`` are updated in place.

        states: for each block the convolution's window (W, channels) and the recurrence's state, (E, N) or (H, P, N)
        float32, both contiguous.
        """
        if not 0 <= token < self.embedding.shape[0]:
            raise ValueError(f"{NAME}: token is {token}; it must be from 0 to {self.embedding.shape[0] - 1}")
        if len(states) != len(self.blocks):
            raise ValueError(f"{NAME}: {len(states)} states were given for {len(self.blocks)} blocks")
        for i, ((conv, ssm), block) in enumerate(zip(states, self.blocks, strict=True)):
            if ssm.dtype != torch.float32 or not ssm.is_contiguous() or ssm.numel() != block.inner * block.states:
                raise ValueError(
                    f"{NAME}: states[{i}] is {ssm.dtype} of shape {tuple(ssm.shape)}; it must be contiguous float32 "
                    f"with {block.inner} x {block.states} numbers"
                )
            if conv.shape != block.conv.shape or not conv.is_contiguous() or conv.dtype == torch.float64:
                raise ValueError(
                    f"{NAME}: the window of block {i} is {conv.dtype} of shape {tuple(conv.shape)}; it must be "
                    f"contiguous {tuple(block.conv.shape)} in float32, bfloat16 or float16"
                )
        if self._native is not None and _backends.forced() != "reference":
            return self._native.step(token, states)
        from .reference import step

        return step(self, token, states)


def unavailable() -> str | None:
    """Why no native step can run here, or None."""
    return _native.missing(NAME)
