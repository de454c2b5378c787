"""The Triton path of the selective scan: forward and backward.

The several paths are walked one after the other, each by one launch that adds into the same output; nothing is permuted
or repeated in memory. Where sequences times channel blocks cannot fill the device, the length is cut into segments: a
first pass yields each segment's end state and decay, a short one carries states from segment to segment, and the walk
follows. Gradients replay the states from the borders that forward kept; sums over channels, sequences and segments are
partial sums added in a fixed order, so that runs repeat bit by bit.

Limit: per state and step one exponential on the special-function units (16 a clock and multiprocessor on sm_80 and
sm_90, that is 8 cycles a warp and scheduler) beside about 6 issue slots of multiply-adds and loads. A walk has few
warps, so nothing hides the way from memory but loads that are issued early: u, dt and z an iteration ahead, the rows of
B and C, which the second-level cache holds, a group ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo_kernels import _gpu

from . import _triton_kernels as kernels
from .low_rank import gradients, product

CHUNK = 64  # as in __init__.empty_borders


class Config(NamedTuple):
    """channels a program walks; steps a group; groups an iteration, whose u, dt and z are read one iteration ahead;
    backward: sets that the channels are in."""

    BC: int
    U: int
    GROUPS: int
    SETS: int = 1


# The best of a sweep on an H200: forward within 8 % of each other at every size that was tried.
FORWARD = (Config(128, 4, 2), Config(16, 2, 8))
BACKWARD = (Config(16, 2, 4), Config(32, 2, 4))


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


class _Problem:
    """The arguments as the kernels want them, and the sizes that follow."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, init, resets, lengths):
        self.batch, self.length, self.K, self.channels = dt.shape
        self.N, self.G = A.shape[2], B.shape[3]
        self.width = self.channels // self.G
        self.steps = self.length if path is None else path.shape[2]
        self.u, self.dt = _gpu.rows(u), _gpu.rows(dt)
        self.z = None if z is None else _gpu.rows(z)
        self.A = (A.to(torch.float32) * _gpu.LOG2E.value).transpose(1, 2).contiguous()  # (K, N, channels)
        self.B, self.C, self.D, self.bias = B, C, D, dt_bias
        self.softplus, self.reverse, self.path = dt_softplus, reverse, path
        self.resets = None if resets is None else resets.view(torch.uint8)
        self.lengths = lengths
        self.init = (
            None if init is None else init.to(torch.float32).transpose(2, 3).contiguous()
        )  # (batch, K, N, channels)
        self.chunks = triton.cdiv(self.steps, CHUNK)
        # Every row is written when all steps are walked and visit every row.
        self.partial = lengths is not None or self.steps < self.length

    def states(self, *lead: int) -> Tensor:
        return self.u.new_empty(*lead, self.N, self.channels, dtype=torch.float32)

    def row_of_states(self, value: Tensor) -> Tensor:
        """B or C as float32: converted once here rather than by every channel block, and always aligned."""
        return value.to(torch.float32).contiguous()

    def plan(self, config: Config, split: int | None) -> dict[str, int]:
        BC = max(config.SETS, min(config.BC, _gpu.power_of_two(self.width, 16)))
        blocks = triton.cdiv(self.width, BC)
        programs = self.batch * self.G * blocks
        warps = max(1, BC // config.SETS // 32) * max(1, _gpu.power_of_two(self.N) // 32)
        wanted = 1 if split is None else split
        # A walk in segments costs nearly two walks: worth it where most of the four schedulers of each multiprocessor
        # would have no warp.
        if split is None and programs * warps < 2 * _gpu.multiprocessors(self.u):
            wanted = 6 * _gpu.multiprocessors(self.u) // max(1, programs * warps)
        segments = max(1, min(wanted, self.chunks))
        span = triton.cdiv(max(1, self.chunks), segments) * CHUNK
        segments = max(1, triton.cdiv(self.steps, span))
        return {"BC": BC, "blocks": blocks, "programs": programs, "warps": warps, "segments": segments, "span": span}

    def wide(self, *strides: int) -> bool:
        """Whether offsets inside one sequence need 64 bits: rows ``strides`` apart, or as our own tensors have them."""
        return self.length * max(*strides, self.channels, self.G * self.N) >= 1 << 31

    def path_of(self, k: int) -> tuple[Tensor | None, int]:
        if self.path is None:
            return None, 0
        return self.path[:, k], self.path.stride(0) if self.path.shape[0] > 1 else 0

    def of(self, k: int) -> dict:
        """What the kernels take for path ``k``."""
        path, path_b = self.path_of(k)
        u = self.u[:, :, min(k, self.u.shape[2] - 1)]
        dt = self.dt[:, :, k]
        return {
            "u": u, "dt": dt, "A": self.A[k], "D": None if self.D is None else self.D[k].contiguous(),
            "bias": None if self.bias is None else self.bias[k].contiguous(), "path": path, "path_b": path_b,
            "B": self.row_of_states(self.B[:, :, k]), "C": self.row_of_states(self.C[:, :, k]),
            "u_b": u.stride(0), "u_l": u.stride(1), "dt_b": dt.stride(0), "dt_l": dt.stride(1),
            "init": None if self.init is None else self.init[:, k], "reverse": bool(self.reverse[k]),
        }  # fmt: skip


def _walk(p: _Problem, k: int, z, y, borders, final, add: bool, config: Config, split: int | None) -> None:
    """One path: y (batch, length, channels), borders (batch, chunks, N, channels), final (batch, N, channels)."""
    a, plan = p.of(k), p.plan(config, split)
    meta = {
        "N": p.N, "G": p.G, "BN": _gpu.power_of_two(p.N), "BC": plan["BC"], "num_warps": plan["warps"],
    }  # fmt: skip
    walk = {
        "U": config.U, "GROUPS": config.GROUPS, "CHUNK": CHUNK, "SOFTPLUS": p.softplus, "REVERSE": a["reverse"],
    }  # fmt: skip
    z_b, z_l = (0, 0) if z is None else (z.stride(0), z.stride(1))
    segments, programs = plan["segments"], plan["programs"]
    states, state_b, state_s = a["init"], p.K * p.N * p.channels, 0
    inner = p.N * p.channels

    def scan(states, state_b, state_s, z, y, borders, final, final_b, decay, keep, summary):
        _gpu.launch(
            kernels.scan_kernel, programs * segments, a["u"], a["dt"], a["A"], a["B"], a["C"], a["D"], z, a["bias"],
            a["path"], p.resets, p.lengths, states, y, borders, final, decay, keep, a["u_b"], a["u_l"], a["dt_b"],
            a["dt_l"], z_b, z_l, a["path_b"], 0 if borders is None else borders.stride(0), state_b, state_s, final_b,
            p.length, p.steps, p.channels, p.width, plan["blocks"], segments, plan["span"], SUMMARY=summary, ADD=add,
            WIDE=p.wide(a["u_l"], a["dt_l"], z_l), **meta, **walk,
        )  # fmt: skip

    if segments > 1:
        ends, incoming = p.states(p.batch, segments), p.states(p.batch, segments)
        decay = p.u.new_empty(p.batch, segments, p.channels, dtype=torch.float32)
        keep = torch.empty_like(decay)
        scan(None, 0, inner, None, None, None, ends, ends.stride(0), decay, keep, True)
        _gpu.launch(
            kernels.carry_kernel, programs, a["A"], ends, decay, keep, states, incoming, state_b,
            p.channels, p.width, plan["blocks"], segments, BACKWARD=False, **meta,
        )  # fmt: skip
        states, state_b, state_s = incoming, incoming.stride(0), inner
    final_b = 0 if final is None else final.stride(0)
    scan(states, state_b, state_s, z, y, borders, final, final_b, None, None, False)


def _forward(p: _Problem, z, return_final: bool, save: bool, config: Config, split: int | None):
    """y before a gate over several paths, borders, final (batch, K, N, channels)."""
    # Several paths add up in float32, whatever the dtype; rows that a path leaves out must start at 0.
    exact = torch.float32 if p.K > 1 else p.u.dtype
    make = torch.zeros if p.partial else torch.empty
    y = make(p.batch, p.length, p.channels, dtype=exact, device=p.u.device)
    borders = p.states(p.batch, p.K, p.chunks) if save else None
    final = p.states(p.batch, p.K) if return_final else None
    for k in range(p.K):
        _walk(
            p, k, z if p.K == 1 else None, y, None if borders is None else borders[:, k],
            None if final is None else final[:, k], k > 0, config, split,
        )  # fmt: skip
    return y, borders, final


def forward(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths,
    dt_proj=None, *, save, config: Config | None = None, split: int | None = None,
):  # fmt: skip
    """See :func:`zoo_kernels.selective_scan`; canonical arguments. ``config`` and ``split`` are for tests and
    tuning."""
    if dt_proj is not None:
        dt = product(dt, dt_proj)
    p = _Problem(u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, resets, lengths)
    with _gpu.guard(u):
        if config is None:
            config = _gpu.tuned(
                ("selective_scan", p.N, p.K, u.dtype), FORWARD,
                lambda one: _forward(p, p.z, False, False, one, split), u, dt.numel() * p.N,
            )  # fmt: skip
        y, borders, final = _forward(p, p.z, return_final_state, save, config, split)
        if p.K > 1:
            y = (y if z is None else y * F.silu(z.to(torch.float32))).to(u.dtype)
        nothing = u.new_empty(0, dtype=torch.float32)
        final = nothing if final is None else final.transpose(2, 3).contiguous()
        return y, final, nothing.clone() if borders is None else borders


def backward(grads, arguments, saved, needs, *, config: Config | None = None, split: int | None = None):
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state, dt_proj."""
    u, dt, A, B, C, D, z, dt_bias, softplus, path, reverse, init, return_final, resets, lengths, dt_proj = arguments
    low = dt
    if dt_proj is not None:
        dt = product(dt, dt_proj)
    p = _Problem(u, dt, A, B, C, D, z, dt_bias, softplus, path, reverse, init, resets, lengths)
    with _gpu.guard(u):
        if config is None:
            config = _gpu.tuned(
                ("selective_scan_backward", p.N, p.K, u.dtype), BACKWARD,
                lambda one: _backward(p, grads, saved, return_final, one, split), u, 2 * dt.numel() * p.N,
            )  # fmt: skip
        found = [*_backward(p, grads, saved, return_final, config, split), None]
        if dt_proj is not None:
            found[1], found[-1] = gradients(found[1], low, dt_proj)
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


def _backward(p: _Problem, grads, saved, return_final, config: Config, split: int | None):
    f32 = {"dtype": torch.float32, "device": p.u.device}
    make = torch.zeros if p.partial else torch.empty
    dy, borders = grads[0].contiguous(), saved[0]
    dfinal = grads[1].to(torch.float32).transpose(2, 3).contiguous() if return_final else None
    dz = None
    if p.z is not None and p.K > 1:  # the gate is on the sum over paths, which is computed again
        y, _, _ = _forward(p, None, False, False, FORWARD[0], split)
        gate = p.z.to(torch.float32)
        s = torch.sigmoid(gate)
        dz = dy * y * (s * (1 + gate * (1 - s)))
        dy = dy * (gate * s)
    elif p.z is not None:
        dz = make(p.batch, p.length, p.channels, dtype=p.z.dtype, device=p.u.device)
    shared = p.u.shape[2] == 1
    du_dtype = torch.float32 if shared and p.K > 1 else p.u.dtype
    du = make(p.batch, p.length, p.u.shape[2], p.channels, dtype=du_dtype, device=p.u.device)
    ddt = make(p.batch, p.length, p.K, p.channels, dtype=p.dt.dtype, device=p.u.device)
    dB, dC = (torch.empty(p.batch, p.length, p.K, p.G, p.N, **f32) for _ in range(2))
    dA = torch.empty(p.K, p.N, p.channels, **f32)
    dD = None if p.D is None else torch.empty(p.K, p.channels, **f32)
    dbias = None if p.bias is None else torch.empty(p.K, p.channels, **f32)
    dinit = None if p.init is None else torch.empty_like(p.init)
    for k in range(p.K):
        _backward_path(
            p, k, dy, borders, dfinal, du[:, :, min(k, p.u.shape[2] - 1)], ddt[:, :, k], dA, dB, dC, dD,
            dz if p.K == 1 else None, dbias, None if dinit is None else dinit[:, k], shared and k > 0, config, split,
        )  # fmt: skip
    dinit = None if dinit is None else dinit.transpose(2, 3)
    return [du, ddt, dA.transpose(1, 2), dB, dC, dD, dz, dbias, dinit]


def _backward_path(
    p: _Problem, k, dy, borders, dfinal, du, ddt, dA, dB, dC, dD, dz, dbias, dinit, add, config: Config, split
) -> None:
    a, plan = p.of(k), p.plan(config, split)
    segments, blocks, programs = plan["segments"], plan["blocks"], plan["programs"]
    meta = {"N": p.N, "G": p.G, "BN": _gpu.power_of_two(p.N), "BC": plan["BC"], "num_warps": plan["warps"]}
    z = p.z if dz is not None else None
    z_b, z_l = (0, 0) if z is None else (z.stride(0), z.stride(1))
    flags = {
        "U": config.U, "SOFTPLUS": p.softplus, "REVERSE": a["reverse"],
        "WIDE": p.wide(a["u_l"], a["dt_l"], z_l, du.stride(1), ddt.stride(1)),
    }  # fmt: skip
    f32 = {"dtype": torch.float32, "device": p.u.device}
    inner = p.N * p.channels
    incoming, d_b, d_s = (None, 0, 0) if dfinal is None else (dfinal[:, k], dfinal.stride(0), 0)
    if segments > 1:
        ends, states = p.states(p.batch, segments), p.states(p.batch, segments)
        decay, keep = (torch.empty(p.batch, segments, p.channels, **f32) for _ in range(2))
        _gpu.launch(
            kernels.backward_summary_kernel, programs * segments, a["dt"], a["A"], a["C"], z, a["bias"], a["path"],
            p.resets, p.lengths, dy, ends, decay, keep, a["dt_b"], a["dt_l"], z_b, z_l, a["path_b"], p.length, p.steps,
            p.channels, p.width, blocks, segments, plan["span"], **meta, **flags,
        )  # fmt: skip
        _gpu.launch(
            kernels.carry_kernel, programs, a["A"], ends, decay, keep, incoming, states, d_b,
            p.channels, p.width, blocks, segments, BACKWARD=True, **meta,
        )  # fmt: skip
        incoming, d_b, d_s = states, states.stride(0), inner
    # A bounded number of programs, each with room for one chunk's states, takes the units of work in turn.
    running = min(programs * segments, 32 * _gpu.multiprocessors(p.u) // plan["warps"] + 1)
    scratch = torch.empty(running, CHUNK // config.U, meta["BN"], plan["BC"], **f32)
    make = torch.zeros if p.partial else torch.empty
    parts_B, parts_C = (make(blocks, p.batch, p.length, p.G, p.N, **f32) for _ in range(2))
    parts_A = torch.empty(p.batch, segments, p.N, p.channels, **f32)
    parts_D = None if dD is None else torch.empty(p.batch, segments, p.channels, **f32)
    parts_bias = None if dbias is None else torch.empty(p.batch, segments, p.channels, **f32)
    _gpu.launch(
        kernels.backward_kernel, running, a["u"], a["dt"], a["A"], a["B"], a["C"], a["D"], z, a["bias"], a["path"],
        p.resets, p.lengths, borders[:, k], dy, incoming, du, ddt, parts_A, parts_B, parts_C, parts_D, dz, parts_bias,
        dinit, scratch, a["u_b"], a["u_l"], a["dt_b"], a["dt_l"], z_b, z_l, a["path_b"], borders.stride(0), d_b, d_s,
        du.stride(0), du.stride(1), ddt.stride(0), ddt.stride(1), 0 if dinit is None else dinit.stride(0), p.batch,
        p.length, p.steps, p.channels, p.width, blocks, segments, plan["span"], programs * segments, CHUNK=CHUNK,
        SETS=config.SETS, GROUPS=config.GROUPS, ADD=add, **meta, **flags,
    )  # fmt: skip
    dA[k] = parts_A.sum((0, 1))
    dB[:, :, k], dC[:, :, k] = parts_B.sum(0), parts_C.sum(0)
    if dD is not None and parts_D is not None:
        dD[k] = parts_D.sum((0, 1))
    if dbias is not None and parts_bias is not None:
        dbias[k] = parts_bias.sum((0, 1))
