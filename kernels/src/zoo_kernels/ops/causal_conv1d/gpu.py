# Compile-time and run-time conditions must not share an `if`, and types in kernels are those of the device.
# ruff: noqa: SIM102
"""The Triton path of the causal convolution along a path: forward and backward.

A program computes a tile of steps times channels; a tap is one gathered row per step, read again from cache by its
neighbours. Step ``s < 0`` is row ``width + s`` of the initial state. A reset hides all steps before it, so what tap
``k`` steps back sees is the product of ``k`` flags. Bound: one read of x and one write of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo_kernels import _gpu
from zoo_kernels._gpu import program, row_of, sigmoid, silu_grad

from . import several

BT, BC = 16, 128


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


@triton.jit
def tap(x, state, b, s, count, path, path_b, x_b, x_l, c, cm, channels, W: tl.constexpr, REVERSE: tl.constexpr):
    """Rows of steps ``s`` (BT,) as (BT, BC) float32: of x, of the initial state before step 0, or 0."""
    row = row_of(s, count, b, path, path_b, REVERSE)
    there = (s >= 0) & (s < count)
    at = x + b * x_b + row[:, None] * x_l + c[None, :]
    value = tl.load(at, mask=there[:, None] & cm[None, :], other=0.0).to(tl.float32)
    if state is not None:
        before = (s < 0) & (s >= -W)
        at_state = state + (b * W + tl.where(before, W + s, 0))[:, None] * channels + c[None, :]
        value += tl.load(at_state, mask=before[:, None] & cm[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def drop_at(resets, b, s, count, length, path, path_b, REVERSE: tl.constexpr):
    """Whether step ``s`` starts a new sequence."""
    row = row_of(s, count, b, path, path_b, REVERSE)
    return tl.load(resets + b * length + row, mask=(s >= 0) & (s < count), other=0) != 0


@triton.jit(do_not_specialize=["path_b", "length", "steps", "tiles", "total"])
def forward_kernel(
    x, weight, bias, path, state, resets, lengths, y, dy, g, dweight, dbias,
    x_b, x_l, path_b, length, steps, channels, tiles, total,
    W: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y; or, given dy, the gradient ``g`` before the activation in walking order, and partial sums of weight and
    bias."""
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        block = work % blocks
        tile = (work // blocks) % tiles
        b = work // (blocks * tiles)
        c = block * BC + tl.arange(0, BC)
        cm = c < channels
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        t = tile * BT + tl.arange(0, BT)
        there = t < count
        mask = there[:, None] & cm[None, :]
        sums = tl.zeros([BT, BC], tl.float32)
        if bias is not None:
            sums += tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)[None, :]
        seen = tl.full([BT], 1, tl.int1)
        for k in tl.static_range(W):
            value = tap(x, state, b, t - k, count, path, path_b, x_b, x_l, c, cm, channels, W, REVERSE)
            if resets is not None:
                value = tl.where(seen[:, None], value, 0.0)
                seen = seen & (drop_at(resets, b, t - k, count, length, path, path_b, REVERSE) == 0)
            sums += tl.load(weight + c * W + (W - 1 - k), mask=cm, other=0.0).to(tl.float32)[None, :] * value
        row = row_of(t, count, b, path, path_b, REVERSE)
        at = (b * length + row)[:, None] * channels + c[None, :]
        if dy is None:
            if SILU:
                sums = sums * sigmoid(sums)
            tl.store(y + at, sums.to(y.dtype.element_ty), mask=mask)
        else:
            grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            if SILU:
                grad = grad * silu_grad(sums)
            at_step = (b * steps + t)[:, None] * channels + c[None, :]
            tl.store(g + at_step, grad, mask=(t < steps)[:, None] & cm[None, :])
            part = b * tiles + tile
            tl.store(dbias + part * channels + c, tl.sum(grad, 0), mask=cm)
            seen = tl.full([BT], 1, tl.int1)
            for k in tl.static_range(W):
                value = tap(x, state, b, t - k, count, path, path_b, x_b, x_l, c, cm, channels, W, REVERSE)
                if resets is not None:
                    value = tl.where(seen[:, None], value, 0.0)
                    seen = seen & (drop_at(resets, b, t - k, count, length, path, path_b, REVERSE) == 0)
                at_part = (part * W + (W - 1 - k)) * channels + c
                tl.store(dweight + at_part, tl.sum(grad * value, 0), mask=cm)


@triton.jit(do_not_specialize=["path_b", "length", "steps", "tiles", "total"])
def input_gradient_kernel(
    g, weight, path, resets, lengths, dfinal, dx, dstate, path_b, length, steps, channels, tiles, total,
    W: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx at the rows of the steps, and of the steps -W .. -1 the gradient of the initial state."""
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        block = work % blocks
        tile = (work // blocks) % tiles
        b = work // (blocks * tiles)
        c = block * BC + tl.arange(0, BC)
        cm = c < channels
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        s = tile * BT + tl.arange(0, BT) - W
        sums = tl.zeros([BT, BC], tl.float32)
        seen = tl.full([BT], 1, tl.int1)
        for k in tl.static_range(W):
            t = s + k
            if resets is not None:
                if k > 0:
                    seen = seen & (drop_at(resets, b, t, count, length, path, path_b, REVERSE) == 0)
            there = (t >= 0) & (t < count) & seen
            at_step = (b * steps + tl.where(there, t, 0))[:, None] * channels + c[None, :]
            value = tl.load(g + at_step, mask=there[:, None] & cm[None, :], other=0.0)
            sums += tl.load(weight + c * W + (W - 1 - k), mask=cm, other=0.0).to(tl.float32)[None, :] * value
        if dfinal is not None:
            # Step s is row W - count + s of the final state, unless a later reset hides it.
            place = W - count + s
            kept = (place >= 0) & (place < W)
            if resets is not None:
                for k in tl.static_range(1, W):
                    after = drop_at(resets, b, s + k, count, length, path, path_b, REVERSE)
                    kept = kept & (after == 0)
            at_final = (b * W + tl.where(kept, place, 0))[:, None] * channels + c[None, :]
            sums += tl.load(dfinal + at_final, mask=kept[:, None] & cm[None, :], other=0.0)
        row = row_of(s, count, b, path, path_b, REVERSE)
        mask = ((s >= 0) & (s < count))[:, None] & cm[None, :]
        tl.store(dx + (b * length + row)[:, None] * channels + c[None, :], sums.to(dx.dtype.element_ty), mask=mask)
        if dstate is not None:
            before = s < 0
            at_state = dstate + (b * W + tl.where(before, W + s, 0))[:, None] * channels + c[None, :]
            tl.store(at_state, sums, mask=before[:, None] & cm[None, :])


@triton.jit(do_not_specialize=["path_b", "length", "steps", "total"])
def final_kernel(
    x, path, state, resets, lengths, final, x_b, x_l, path_b, length, steps, channels, total,
    W: tl.constexpr, BW: tl.constexpr, REVERSE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last W rows of the walk, newest last."""
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        b = work // blocks
        c = (work % blocks) * BC + tl.arange(0, BC)
        cm = c < channels
        count = steps.to(tl.int64)
        if lengths is not None:
            count = tl.load(lengths + b).to(tl.int64)
        place = tl.arange(0, BW)
        s = count - W + place
        value = tap(x, state, b, s, count, path, path_b, x_b, x_l, c, cm, channels, W, REVERSE)
        if resets is not None:
            seen = tl.full([BW], 1, tl.int1)
            for k in tl.static_range(1, W):
                seen = seen & (drop_at(resets, b, s + k, count, length, path, path_b, REVERSE) == 0)
            value = tl.where(seen[:, None], value, 0.0)
        at = final + (b * W + place)[:, None] * channels + c[None, :]
        tl.store(at, value.to(final.dtype.element_ty), mask=(place < W)[:, None] & cm[None, :])


def _common(x: Tensor, path: Tensor | None):
    steps = x.shape[1] if path is None else path.shape[-1]
    path, path_b = _gpu.walk_of(path)
    return steps, path, path_b


@several.forward
def forward(x, weight, bias, silu, path, reverse, initial_state, return_final_state, resets, lengths, *, save=False):
    """See :func:`zoo_kernels.causal_conv1d`; canonical arguments."""
    x = _gpu.rows(x)
    batch, length, channels = x.shape
    W = weight.shape[1]
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    resets = None if resets is None else resets.view(torch.uint8)
    steps, path, path_b = _common(x, path)
    make = torch.empty if steps == length and lengths is None else torch.zeros
    y = make(batch, length, channels, dtype=x.dtype, device=x.device)
    final = x.new_empty((batch, W, channels) if return_final_state else (0,), dtype=torch.float32)
    blocks, tiles = triton.cdiv(channels, BC), triton.cdiv(steps, BT)
    with _gpu.guard(x):
        _gpu.launch(
            forward_kernel, batch * tiles * blocks, x, weight, bias, path, state, resets, lengths, y, None, None, None,
            None, x.stride(0), x.stride(1), path_b, length, steps, channels, tiles, W=W, SILU=silu,
            REVERSE=bool(reverse[0]), BT=BT, BC=BC,
        )  # fmt: skip
        if return_final_state:
            _gpu.launch(
                final_kernel, batch * blocks, x, path, state, resets, lengths, final, x.stride(0), x.stride(1), path_b,
                length, steps, channels, W=W, BW=_gpu.power_of_two(W), REVERSE=bool(reverse[0]), BC=BC,
            )  # fmt: skip
    return y, final


@several.backward
def backward(grads, arguments, saved, needs):
    """Gradients of x, weight, bias, initial_state."""
    x, weight, bias, silu, path, reverse, initial_state, return_final, resets, lengths = arguments
    x = _gpu.rows(x)
    batch, length, channels = x.shape
    W = weight.shape[1]
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    resets = None if resets is None else resets.view(torch.uint8)
    steps, path, path_b = _common(x, path)
    f32 = {"dtype": torch.float32, "device": x.device}
    make = torch.empty if steps == length and lengths is None else torch.zeros
    dx = make(batch, length, channels, dtype=x.dtype, device=x.device)
    dstate = None if state is None else torch.empty(batch, W, channels, **f32)
    blocks, tiles = triton.cdiv(channels, BC), triton.cdiv(steps, BT)
    g = torch.empty(batch, steps, channels, **f32)
    dweight = torch.empty(batch, tiles, W, channels, **f32)
    dbias = torch.empty(batch, tiles, channels, **f32)
    with _gpu.guard(x):
        _gpu.launch(
            forward_kernel, batch * tiles * blocks, x, weight, bias, path, state, resets, lengths, None,
            grads[0].contiguous(), g, dweight, dbias, x.stride(0), x.stride(1), path_b, length, steps, channels, tiles,
            W=W, SILU=silu, REVERSE=bool(reverse[0]), BT=BT, BC=BC,
        )  # fmt: skip
        tiles = triton.cdiv(steps + W, BT)
        dfinal = grads[1].to(torch.float32).contiguous() if return_final else None
        _gpu.launch(
            input_gradient_kernel, batch * tiles * blocks, g, weight, path, resets, lengths, dfinal, dx, dstate, path_b,
            length, steps, channels, tiles, W=W, REVERSE=bool(reverse[0]), BT=BT, BC=BC,
        )  # fmt: skip
    return [dx, dweight.sum((0, 1)).t(), None if bias is None else dbias.sum((0, 1)), dstate]
