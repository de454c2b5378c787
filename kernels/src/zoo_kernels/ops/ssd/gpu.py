"""The Triton path of the scan with one decay per head, in chunks of 32 to 128 steps; it serves all forms of ``ssd``,
``linear_attention``, ``mlstm`` and ``mamba3_scan``.

Forward: one kernel walks the chunks and leaves the state before each of them, a second one computes all outputs at
once. Backward: the same walk, its mirror image for the gradients of the states, then one kernel for values and weights
and one for keys, queries and decays. Rows are gathered along ``order`` as they are read. bfloat16 goes to the tensor
cores as it is, float16 as tf32 (the same mantissa, the range of float32), float32 as three tf32 products. Sums over
heads and blocks are partial sums added in a fixed order. Source: Dao and Gu, arXiv 2405.21060, section 6; the gradients
are those of ``chunked.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo_kernels import _gpu

from . import _triton_kernels as kernels


class Tiles(NamedTuple):
    """steps of a chunk; channels and states of a tile; warps and stages of a program."""

    Q: int
    BP: int
    BN: int
    warps: int
    stages: int


class Choice(NamedTuple):
    """Tiles to choose from; the first serves where nothing was timed."""

    forward: tuple[Tiles, ...]
    backward: tuple[Tiles, ...]
    keys: tuple[Tiles, ...]


# Longer chunks write fewer states. The gradient of keys holds three accumulators and two masks at once: narrow tiles,
# or more threads.
LOW = Choice(
    (Tiles(64, 64, 64, 4, 2), Tiles(128, 64, 64, 8, 2), Tiles(64, 64, 64, 8, 2)),
    (Tiles(64, 64, 64, 4, 2), Tiles(64, 64, 64, 8, 2)),
    (Tiles(64, 32, 32, 8, 1), Tiles(64, 64, 64, 8, 1)),
)
EXACT = Choice((Tiles(64, 64, 64, 8, 1),), (Tiles(64, 64, 64, 8, 1),), (Tiles(64, 16, 16, 8, 1),))  # products in tf32
# No tile has 64 rows (see _gpu.warpgroups).
NARROW_LOW = Choice(*[(Tiles(32, 32, 32, 4, 1),)] * 3)
NARROW_EXACT = Choice((Tiles(32, 32, 32, 4, 1),), (Tiles(32, 32, 32, 4, 1),), (Tiles(32, 16, 16, 2, 1),))


def choice(v: Tensor, k: Tensor, q: Tensor) -> Choice:
    low = _low(v, k, q)
    if _gpu.warpgroups(v):
        return NARROW_LOW if low else NARROW_EXACT
    return LOW if low else EXACT


def _low(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.bfloat16 for t in tensors)


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


class _Problem:
    def __init__(self, v, decay, weight, k, q, D, state, resets, order, strict, *, tiles: Tiles):
        self.batch, self.length, self.heads, self.P = v.shape
        self.groups, self.N = k.shape[2:]
        self.repeat = self.heads // self.groups if self.groups else 1
        self.steps = self.length if order is None else order.shape[1]
        self.chunks = triton.cdiv(self.steps, tiles.Q)
        self.v, self.k, self.q = (_gpu.rows(t) for t in (v, k, q))
        self.decay, self.weight = decay, weight
        self.D = D
        if D is not None:
            wide = D[:, None].expand(-1, self.P) if D.dim() == 1 else D
            self.D = wide.to(torch.float32).contiguous()
        self.D_per_head = D is not None and D.dim() == 1
        self.state = None if state is None else state.contiguous()
        self.resets = None if resets is None else resets.view(torch.uint8)
        self.order, self.order_b = _gpu.walk_of(order)
        self.whole = order is None  # otherwise some rows may not be visited
        exact = torch.float32 in (v.dtype, k.dtype, q.dtype)
        self.kind = {
            "P": self.P, "N": self.N, "DOT": tl.bfloat16 if _low(v, k, q) else tl.float32,
            "PRECISION": "tf32x3" if exact else "tf32",
        }  # fmt: skip
        self.meta = self.meta_of(tiles)
        self.p_blocks = triton.cdiv(self.P, self.meta["BP"])
        self.n_blocks = triton.cdiv(self.N, self.meta["BN"])
        self.strict = {"STRICT": bool(strict)}

    def meta_of(self, tiles: Tiles) -> dict[str, object]:
        return {
            **self.kind, "Q": tiles.Q, "BP": min(tiles.BP, _gpu.power_of_two(self.P, 16)),
            "BN": min(tiles.BN, _gpu.power_of_two(self.N, 16)), "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def strides(self, *names: str) -> list[int]:
        found: list[int] = []
        for name in names:
            tensor = getattr(self, name)
            found += [0, 0, 0] if tensor is None else list(tensor.stride()[:3])
        return found

    def sizes(self) -> tuple[int, ...]:
        return self.order_b, self.batch, self.length, self.steps, self.chunks, self.heads, self.repeat

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


def _tuned(name: str, candidates: Sequence[Tiles], v, k, run) -> Tiles:
    work = v.numel() * (v.shape[3] + k.shape[3])
    return _gpu.tuned((name, v.shape[3], k.shape[3]), candidates, run, v, work)


def forward(v, decay, weight, k, q, D, state, resets, order, strict, *, save=False, tiles: Tiles | None = None):
    """See :func:`zoo_kernels.ops.ssd.reference.forward`; the same arguments and results. ``tiles`` is for tests."""
    arguments = (v, decay, weight, k, q, D, state, resets, order, strict)
    with _gpu.guard(v):
        if tiles is None:
            candidates = choice(v, k, q).forward
            tiles = _tuned("ssd", candidates, v, k, lambda one: _forward(_Problem(*arguments, tiles=one)))
        return _forward(_Problem(*arguments, tiles=tiles))


def _forward(p: _Problem) -> tuple[Tensor, Tensor]:
    borders, final = p.borders()
    y = p.rows(p.batch, p.length, p.heads, p.P, dtype=p.v.dtype)
    _gpu.launch(
        kernels.output_kernel, p.batch * p.chunks * p.heads * p.p_blocks,
        p.v, p.decay, p.weight, p.k, p.q, p.D, p.resets, p.order, borders, y,
        *p.strides("v", "decay", "weight", "k", "q"), p.order_b, p.length, p.steps, p.chunks, p.heads, p.repeat,
        **p.meta, **p.strict,
    )  # fmt: skip
    return y, final


def backward(grads, arguments, saved, needs):
    """Gradients of v, decay, weight, k, q, D, state."""
    v, k, q = arguments[0], arguments[3], arguments[4]
    grads = [t.contiguous() for t in grads]
    candidates = choice(v, k, q)
    with _gpu.guard(v):
        tiles = _tuned(
            "ssd_backward", candidates.backward, v, k,
            lambda one: _of_values(_Problem(*arguments, tiles=one), *grads),
        )  # fmt: skip
        p = _Problem(*arguments, tiles=tiles)
        borders, dborders, dv, dweight, dD, dstate = _of_values(p, *grads)
        keys = _tuned(
            "ssd_keys", candidates.keys, v, k,
            lambda one: _of_keys(p, grads[0], borders, dborders, one),
        )  # fmt: skip
        dk, dq, ddecay = _of_keys(p, grads[0], borders, dborders, keys)
    return [dv, ddecay, dweight, dk, dq, dD, dstate]


def _of_values(p: _Problem, dy: Tensor, dfinal: Tensor):
    """States and their gradients at the borders of chunks; gradients of v, weight, D and the first state."""
    device, f32 = p.v.device, torch.float32
    borders, _ = p.borders()
    dborders = p.states()
    dstate = None if p.state is None else torch.empty(p.batch, p.heads, p.P, p.N, dtype=f32, device=device)
    _gpu.launch(
        kernels.state_gradient_kernel, p.batch * p.heads * p.p_blocks * p.n_blocks,
        p.decay, p.q, dy, p.resets, p.order, dfinal, dborders, dstate, *p.strides("decay", "q"),
        p.order_b, p.length, p.steps, p.chunks, p.heads, p.repeat, **p.meta,
    )  # fmt: skip
    dv = p.rows(p.batch, p.length, p.heads, p.P, dtype=p.v.dtype)
    dweight = None if p.weight is None else p.rows(p.p_blocks, p.batch, p.length, p.heads)
    dD = None if p.D is None else torch.empty(p.batch, p.chunks, p.heads, p.P, dtype=f32, device=device)
    _gpu.launch(
        kernels.value_gradient_kernel, p.batch * p.chunks * p.heads * p.p_blocks,
        p.v, p.decay, p.weight, p.k, p.q, p.D, dy, p.resets, p.order, dborders, dv, dweight, dD,
        *p.strides("v", "decay", "weight", "k", "q"), *p.sizes(), **p.meta, **p.strict,
    )  # fmt: skip
    if dD is not None:
        dD = dD.sum((0, 1, 3)) if p.D_per_head else dD.sum((0, 1))
    return borders, dborders, dv, None if dweight is None else dweight.sum(0), dD, dstate


def _of_keys(p: _Problem, dy: Tensor, borders: Tensor, dborders: Tensor, tiles: Tiles):
    """Gradients of k, q and decay."""
    meta = p.meta_of(tiles)
    blocks = triton.cdiv(p.N, meta["BN"])
    # Heads of a group share their keys: one program sums over as many as leave enough programs for the device.
    programs = p.batch * p.chunks * p.groups * blocks
    splits = max(1, min(p.repeat, 4 * _gpu.multiprocessors(p.v) // max(programs, 1)))
    ddecay = None if p.decay is None else p.rows(blocks, p.batch, p.length, p.heads)
    dk, dq = (p.rows(splits, p.batch, p.length, p.groups, p.N) for _ in range(2))
    _gpu.launch(
        kernels.key_gradient_kernel, programs * splits, p.v, p.decay, p.weight, p.k, p.q, dy, p.resets, p.order,
        borders, dborders, dk, dq, ddecay, *p.strides("v", "decay", "weight", "k", "q"), *p.sizes(), splits,
        **meta, **p.strict,
    )  # fmt: skip
    return dk.sum(0), dq.sum(0), None if ddecay is None else ddecay.sum(0)
