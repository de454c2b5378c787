"""What the Triton kernels share: when they can run, how they are launched and tuned, and small device functions.

Every kernel is launched through :func:`launch` on a linear program number, so that no axis of a problem (a batch of 70
000, say) can exceed a limit of the grid, and every offset derives from that 64-bit number. Only public
``triton.language`` is used. With ``TRITON_INTERPRET=1`` in the environment before the first use, the kernels run on CPU
tensors in Triton's interpreter: slow, and the way to test and to debug them without a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A folded grid's first axis; the second takes the rest. The first may reach 2^31 - 1, the others 65535.
GRID_FOLD = 1 << 30
HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


# -- when they can run -------------------------------------------------------------------------------------------------


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    reason = _triton.unavailable()
    if reason is None and not INTERPRET and not torch.cuda.is_available():
        reason = "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return reason


def unsupported(arguments: Sequence[Any], dtypes: Sequence[torch.dtype] = HALF_OR_FLOAT) -> str | None:
    """Why tensors like these cannot be served, or None: device, and the dtype of every floating-point tensor."""
    for value in arguments:
        if not isinstance(value, Tensor):
            continue
        if value.device.type != ("cpu" if INTERPRET else "cuda"):
            if INTERPRET:
                return f"a tensor is on {value.device}; the interpreter (TRITON_INTERPRET=1) takes CPU tensors"
            return f"a tensor is on {value.device}; Triton compiles for CUDA devices"
        if (value.is_floating_point() or value.is_complex()) and value.dtype not in dtypes:
            words = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"a tensor is {str(value.dtype).removeprefix('torch.')}; the Triton kernel takes {words}"
    return None


# -- launching ---------------------------------------------------------------------------------------------------------


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current one, whatever the tensors say."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def launch(kernel: Any, total: int, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` as ``total`` programs; in it, :func:`program` is the number of the program."""
    if total <= 0:
        return
    grid = (total,) if total <= GRID_FOLD else (GRID_FOLD, triton.cdiv(total, GRID_FOLD))
    kernel[grid](*args, total, **meta)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many there are on the tensor's device (2 in the interpreter, so that small tests split their work)."""
    return _multiprocessors(tensor.device.index) if tensor.device.type == "cuda" else 2


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def warpgroups(tensor: Tensor) -> bool:
    """Whether Triton would multiply tiles of 64 rows by Hopper's warpgroup instructions on the tensor's device.

    Its releases up to 3.7 (at least) and the assemblers in them make wrong code of some such products: seen here as
    wrong sums and as illegal addresses with 3.6 on an H200, reported in flash-linear-attention's issues 640 and 984.
    Tiles of 32 rows are multiplied by the instructions that Ampere has.
    """
    return tensor.device.type == "cuda" and _capability(tensor.device.index) == 9


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, as the kernels want it; else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def power_of_two(value: int, low: int = 1) -> int:
    return max(low, triton.next_power_of_2(max(1, value)))


def block_of(width: int, most: int) -> int:
    """Channels that a program takes: a power of two, a warp at least (in the interpreter no more than there are)."""
    return min(most, power_of_two(width, 1 if INTERPRET else 32))


# -- choosing a configuration ------------------------------------------------------------------------------------------

_choices: dict[Hashable, Any] = {}


def tuned(key: Hashable, candidates: Sequence[Any], run: Callable[[Any], Any], tensor: Tensor, work: int) -> Any:
    """The fastest candidate, timed once for each ``key`` and kept; the first where timing is not worth it.

    ``run(candidate)`` does the whole call and must not change its inputs. ``key`` names what decides the choice (state
    size, dtypes, device: not lengths). Small calls (``work`` below 2^24) take the first candidate and leave the key
    open; so do captured CUDA graphs, in which nothing can be timed.
    """
    if len(candidates) == 1 or tensor.device.type != "cuda":
        return candidates[0]
    key = (tensor.device.index, key)
    if key in _choices:
        return _choices[key]
    if work < 1 << 24 or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    best, best_time = candidates[0], float("inf")
    for candidate in candidates:
        try:
            run(candidate)
        except triton.runtime.errors.OutOfResources:
            continue  # too large for this device: another candidate serves
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run(candidate)
        end.record()
        end.synchronize()
        if start.elapsed_time(end) < best_time:
            best, best_time = candidate, start.elapsed_time(end)
    _choices[key] = best
    return best


# -- device functions --------------------------------------------------------------------------------------------------


@triton.jit
def program():
    """The number of this program, 64 bits wide so that all offsets that derive from it are."""
    return tl.program_id(0).to(tl.int64) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + log1p(e^-|x|); log1p(e) / e on [0, 1] by a polynomial (1.5e-7 relative), so that very
    negative x keep their digits."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = 5.2534578e-3 * e - 2.95885074e-2
    p = p * e + 7.8361668e-2
    p = p * e - 1.36747697e-1
    p = p * e + 1.91114311e-1
    p = p * e - 2.48443699e-1
    p = p * e + 3.33192713e-1
    p = p * e - 4.99995015e-1
    p = p * e + 0.999999971
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def into_L2(pointer):
    """Bring these addresses from memory into the second-level cache; nothing waits for it."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def silu_grad(x):
    """d silu(x) / dx."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product on tensor cores with float32 sums; operands are rounded to ``DOT``."""
    if INTERPRETED:  # the interpreter holds bfloat16 as bits and would multiply these
        return tl.dot(a.to(DOT).to(tl.float32), b.to(DOT).to(tl.float32))
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


# -- walks -------------------------------------------------------------------------------------------------------------


def walk_of(path: Tensor | None) -> tuple[Tensor | None, int]:
    """A path (1 or batch, steps) or (1 or batch, 1, steps) and its stride per sequence, 0 where all share it."""
    if path is None:
        return None, 0
    return path, path.stride(0) if path.shape[0] > 1 else 0


@triton.jit
def row_of(t, count, b, path, path_b, REVERSE: tl.constexpr):
    """The row that step ``t`` of ``count`` visits; row 0 where there is no such step (its loads are to be masked)."""
    there = (t >= 0) & (t < count)
    position = tl.where(there, count - 1 - t if REVERSE else t, 0).to(tl.int64)
    if path is not None:
        position = tl.load(path + b * path_b + position, mask=there, other=0)
    return position
