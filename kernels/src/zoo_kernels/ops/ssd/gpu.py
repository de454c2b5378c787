"""The Triton path of the scan with one decay per head, in chunks of 64 steps; it serves ``ssd`` in all its forms,
``linear_attention``, ``mlstm`` and ``mamba3_scan``.

Forward: one kernel walks the chunks and leaves the state before each of them, a second one computes all outputs at
once. Backward: the same walk, its mirror image for the gradients of the states, then one kernel for values and weights
and one for keys, queries and decays. Rows are gathered along ``order`` as they are read. bfloat16 goes to the tensor
cores as it is, float16 as tf32 (the same mantissa, the range of float32), float32 as three tf32 products. Sums over
heads and blocks are partial sums added in a fixed order. Source: Dao and Gu, arXiv 2405.21060, section 6; the gradients
are those of ``chunked.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo_kernels import _gpu

from . import _triton_kernels as kernels

Q = 64


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


class _Problem:
    def __init__(self, v, decay, weight, k, q, D, state, resets, order, strict):
        self.batch, self.length, self.heads, self.P = v.shape
        self.groups, self.N = k.shape[2:]
        self.repeat = self.heads // self.groups if self.groups else 1
        self.steps = self.length if order is None else order.shape[1]
        self.chunks = triton.cdiv(self.steps, Q)
        self.v, self.k, self.q = (_gpu.rows(t) for t in (v, k, q))
        self.decay, self.weight = decay, weight
        self.D = D
        if D is not None:
            wide = D[:, None].expand(-1, self.P) if D.dim() == 1 else D
            self.D = wide.to(torch.float32).contiguous()
        self.state = None if state is None else state.contiguous()
        self.resets = None if resets is None else resets.view(torch.uint8)
        self.order, self.order_b = _gpu.walk_of(order)
        self.whole = order is None  # otherwise some rows may not be visited
        low = v.dtype == torch.bfloat16 and k.dtype == torch.bfloat16 and q.dtype == torch.bfloat16
        exact = torch.float32 in (v.dtype, k.dtype, q.dtype)
        self.meta = {
            "P": self.P, "N": self.N, "Q": Q, "BP": min(64, _gpu.power_of_two(self.P, 16)),
            "BN": min(64, _gpu.power_of_two(self.N, 16)), "DOT": tl.bfloat16 if low else tl.float32,
            "PRECISION": "tf32x3" if exact else "tf32", "num_warps": 4 if low else 8, "num_stages": 2 if low else 1,
        }  # fmt: skip
        # Three accumulators and two masks alive at once: narrower tiles, more threads, no prefetching.
        small = 32 if low else 16
        self.narrow = {
            **self.meta, "BP": min(small, self.meta["BP"]), "BN": min(small, self.meta["BN"]), "num_warps": 8,
            "num_stages": 1,
        }  # fmt: skip
        self.p_blocks = triton.cdiv(self.P, self.meta["BP"])
        self.n_blocks = triton.cdiv(self.N, self.meta["BN"])
        self.narrow_blocks = triton.cdiv(self.N, self.narrow["BN"])
        self.strict = {"STRICT": bool(strict)}

    def strides(self, *names: str) -> list[int]:
        found: list[int] = []
        for name in names:
            tensor = getattr(self, name)
            found += [0, 0, 0] if tensor is None else list(tensor.stride()[:3])
        return found

    def states(self) -> Tensor:
        shape = (self.batch, self.chunks, self.heads, self.P, self.N)
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def rows(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        make = torch.empty if self.whole else torch.zeros
        return make(shape, dtype=dtype, device=self.v.device)

    def borders(self) -> tuple[Tensor, Tensor]:
        """The states before every chunk and the last one."""
        borders = self.states()
        final = torch.empty(self.batch, self.heads, self.P, self.N, dtype=torch.float32, device=self.v.device)
        _gpu.launch(
            kernels.state_kernel, self.batch * self.heads * self.p_blocks * self.n_blocks,
            self.v, self.decay, self.weight, self.k, self.state, self.resets, self.order, borders, final,
            *self.strides("v", "decay", "weight", "k"), self.order_b, self.length, self.steps, self.chunks, self.heads,
            self.repeat, **self.meta,
        )  # fmt: skip
        return borders, final


def forward(v, decay, weight, k, q, D, state, resets, order, strict, *, save=False):
    """See :func:`zoo_kernels.ops.ssd.reference.forward`; the same arguments and results."""
    p = _Problem(v, decay, weight, k, q, D, state, resets, order, strict)
    with _gpu.guard(v):
        borders, final = p.borders()
        y = p.rows(p.batch, p.length, p.heads, p.P, dtype=v.dtype)
        _gpu.launch(
            kernels.output_kernel, p.batch * p.chunks * p.heads * p.p_blocks,
            p.v, p.decay, p.weight, p.k, p.q, p.D, p.resets, p.order, borders, y,
            *p.strides("v", "decay", "weight", "k", "q"), p.order_b, p.length, p.steps, p.chunks, p.heads, p.repeat,
            **p.meta, **p.strict,
        )  # fmt: skip
    return y, final


def backward(grads, arguments, saved, needs):
    """Gradients of v, decay, weight, k, q, D, state."""
    v, decay, weight, _, _, D, state, *_ = arguments
    p = _Problem(*arguments)
    dy, dfinal = (t.contiguous() for t in grads)
    device = v.device
    with _gpu.guard(v):
        borders, _ = p.borders()
        dborders = p.states()
        shape = (p.batch, p.heads, p.P, p.N)
        dstate = None if state is None else torch.empty(shape, dtype=torch.float32, device=device)
        _gpu.launch(
            kernels.state_gradient_kernel, p.batch * p.heads * p.p_blocks * p.n_blocks,
            p.decay, p.q, dy, p.resets, p.order, dfinal, dborders, dstate, *p.strides("decay", "q"),
            p.order_b, p.length, p.steps, p.chunks, p.heads, p.repeat, **p.meta,
        )  # fmt: skip
        strides = p.strides("v", "decay", "weight", "k", "q")
        sizes = (p.order_b, p.batch, p.length, p.steps, p.chunks, p.heads, p.repeat)
        dv = p.rows(p.batch, p.length, p.heads, p.P, dtype=v.dtype)
        dweight = None if weight is None else p.rows(p.p_blocks, p.batch, p.length, p.heads)
        dD = None if D is None else torch.empty(p.batch, p.chunks, p.heads, p.P, dtype=torch.float32, device=device)
        _gpu.launch(
            kernels.value_gradient_kernel, p.batch * p.chunks * p.heads * p.p_blocks,
            p.v, p.decay, p.weight, p.k, p.q, p.D, dy, p.resets, p.order, dborders, dv, dweight, dD, *strides, *sizes,
            **p.meta, **p.strict,
        )  # fmt: skip
        # Heads of a group share their keys: one program sums over as many as leave enough programs for the device.
        programs = p.batch * p.chunks * p.groups * p.narrow_blocks
        splits = max(1, min(p.repeat, 4 * _gpu.multiprocessors(v) // max(programs, 1)))
        ddecay = None if decay is None else p.rows(p.narrow_blocks, p.batch, p.length, p.heads)
        dk, dq = (p.rows(splits, p.batch, p.length, p.groups, p.N) for _ in range(2))
        _gpu.launch(
            kernels.key_gradient_kernel, programs * splits, p.v, p.decay, p.weight, p.k, p.q, dy, p.resets, p.order,
            borders, dborders, dk, dq, ddecay, *strides, *sizes, splits, **p.narrow, **p.strict,
        )  # fmt: skip
        total_D = None
        if dD is not None and D is not None:
            total_D = dD.sum((0, 1, 3)) if D.dim() == 1 else dD.sum((0, 1))
        return [
            dv, None if ddecay is None else ddecay.sum(0), None if dweight is None else dweight.sum(0), dk.sum(0),
            dq.sum(0), total_D, dstate,
        ]  # fmt: skip
