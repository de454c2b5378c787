"""The CPU path: kernels/native/mamba_step.cpp, one call a token."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo_kernels import _native

if TYPE_CHECKING:
    from . import MambaBlock, MambaStep, Matrix


def _bits(x: float) -> int:
    """A double as the 64-bit integer that the C++ struct reads it from."""
    number: int = struct.unpack("q", struct.pack("d", x))[0]
    return number


def _matrix(matrix: Matrix | None) -> tuple[int, ...]:
    if matrix is None:
        return (0, 0, 0, 0)
    pointers = (_native.pointer(matrix.scale), _native.pointer(matrix.bias))
    return (matrix.weight.data_ptr(), _native.DTYPES[matrix.weight.dtype], *pointers)


def _up(n: int) -> int:
    return -(-n // 16) * 16


class Program:
    """The stack's pointers and sizes as the C++ structs lay them out, and how much room a step needs to work in.

    Nothing here changes between steps, which run without Python's lock: several threads may step with one stack.
    """

    def __init__(self, stack: MambaStep) -> None:
        self.keep: list[Tensor] = []  # tensors made here that only pointers refer to
        rows = [self._block(block) for block in stack.blocks]
        self.fields = len(rows[0]) if rows else 0
        numbers = [n for row in rows for n in row]
        self.layers = (ctypes.c_int64 * len(numbers))(*numbers)  # a step fills in its states in a copy
        dim = stack.norm.shape[0]
        rooms = [(b.inner, b.rank + 2 * b.states, b.in_proj.weight.shape[0]) for b in stack.blocks]
        self.room = _up(dim) + max((sum(map(_up, sizes)) for sizes in rooms), default=0) + 16
        self.vocabulary = stack.head.weight.shape[0]
        self.fixed = (
            stack.embedding.data_ptr(), _native.DTYPES[stack.embedding.dtype],
            stack.norm.data_ptr(), _bits(stack.eps), *_matrix(stack.head),
        )  # fmt: skip
        self.sizes = (len(rows), dim, self.vocabulary)
        self.call = _native.function("mamba_step")

    def _block(self, block: MambaBlock) -> list[int]:
        A = block.A
        if not block.heads:  # the scan computes powers of two
            A = A * (1 / math.log(2))
            self.keep.append(A)
        return [
            2 if block.heads else 1, block.inner, block.states, block.conv.shape[0], block.rank, block.heads,
            block.groups, int(block.norm_before_gate), _bits(block.norm_eps), _bits(block.gate_eps),
            _bits(block.dt_limit[0]), _bits(block.dt_limit[1]), block.norm.data_ptr(), *_matrix(block.in_proj),
            *_matrix(block.x_proj), *_matrix(block.dt_proj), *_matrix(block.out_proj), block.conv.data_ptr(),
            _native.pointer(block.conv_bias), A.data_ptr(), block.skip.data_ptr(), _native.pointer(block.dt_bias),
            _native.pointer(block.gate_norm), 0, 0, 0,
        ]  # fmt: skip

    def step(self, token: int, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        layers = type(self.layers).from_buffer_copy(self.layers)
        for i, (window, state) in enumerate(states, start=1):
            last = i * self.fields
            layers[last - 3] = window.data_ptr()
            layers[last - 2] = _native.DTYPES[window.dtype]
            layers[last - 1] = state.data_ptr()
        logits, work = torch.empty(self.vocabulary), torch.empty(self.room)
        self.call(
            *self.sizes, _native.threads(), token, ctypes.addressof(layers), *self.fixed, logits.data_ptr(),
            work.data_ptr(),
        )  # fmt: skip
        return logits
