"""The kernels on a CPU against named peers and against what the processor could do at most, in one run.

    python benchmarks/kernels.py [--threads 2] [--repeat 9] [--only path] [--json benchmarks/results/kernels.json]

Every result is compared with the float64 reference before anything is timed. The calls of a case take turns, so that a
noisy machine disturbs all alike; medians and the spread (quarter to three quarters) are printed, ratios are of medians.
Peers:

* ``published loop``: mamba_ssm's ``selective_scan_ref`` written anew from its definition: decays and inputs of all
  steps by einsum, then a Python loop over time
* ``bare loop``: C++ on registers alone, the same exponentials and multiply-adds without any memory (``limits.cpp``)
* ``sum``: ``torch.sum`` over as many bytes: the bandwidth that reading reaches

ssd, xLSTM and the linear scan have scripts of their own (``ssd.py``, ``linear_scan.py``); ``--all`` runs them too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo_kernels as zk
from zoo_kernels import _native

Calls = dict[str, Callable[[], Any]]
HERE = Path(__file__).parent


def verify(name: str, found: Tensor, exact: Tensor, limit: float = 2e-5) -> None:
    """Stop where a result differs from the float64 reference: no time of a wrong answer is printed."""
    error = float((found.double() - exact).abs().max() / exact.abs().max())
    if not error <= limit:
        raise SystemExit(f"{name}: differs from the float64 reference by {error:.2g} (allowed {limit:g}): not timed")


def interleaved(calls: Calls, repeat: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn, sorted. A call slower than 0.2 s is repeated three times only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    slow = set()
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > 0.2:
            slow.add(name)
    for i in range(repeat):
        for name, call in calls.items():
            if name in slow and i >= 3:
                continue
            if name not in slow:
                call()  # whatever the call before left in the caches and the allocator is not this one's time
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in times.items()}


def published_loop(u, dt, A, B, C, D, z, bias) -> Tensor:
    """mamba_ssm's reference on (batch, channels, length): everything of all steps, then a loop."""
    dt = F.softplus(dt + bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    put = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    h = torch.zeros(u.shape[0], A.shape[0], A.shape[1])
    ys = []
    # unbind instead of an index for each step: the gradient of an index is a zero tensor of the whole size, which would
    # make the peer's backward needlessly quadratic in the length.
    for a, x, c in zip(decay.unbind(2), put.unbind(2), C.unbind(2), strict=True):
        h = a * h + x
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(ys, dim=2) + u * D[:, None]) * F.silu(z)


def scan_arguments(batch: int, length: int, channels: int, state: int, paths: int | None = None) -> dict[str, Tensor]:
    k = () if paths is None else (paths,)
    r = torch.randn
    return {
        "u": r(batch, length, channels), "dt": r(batch, length, *k, channels),
        "A": -torch.rand(*k, channels, state) * 8,
        "B": r(batch, length, *k, state), "C": r(batch, length, *k, state), "D": r(*k, channels),
        "z": r(batch, length, channels), "dt_bias": r(*k, channels) - 3,
    }  # fmt: skip


def exact(args: dict[str, Tensor], **options: Any) -> Tensor:
    """The float64 reference on the first channels (they do not depend on each other)."""
    few = {n: v.double() for n, v in args.items()}
    for name in ("u", "dt", "D", "z", "dt_bias"):
        few[name] = few[name][..., :32]
    few["A"] = few["A"][..., :32, :]
    with zk.backend("reference"):
        return zk.selective_scan(**few, dt_softplus=True, **options)[0]


def bare_loop(updates: int) -> Callable[[], None]:
    sink = torch.zeros(64)
    limit = _native.function("scan_limit")
    return lambda: limit(updates, torch.get_num_threads(), sink.data_ptr())


SHAPE = (1, 1024, 1536, 16)


def forward() -> tuple[Calls, str, int]:
    args = scan_arguments(*SHAPE)
    first = {n: v.transpose(1, 2).contiguous() if n in ("u", "dt", "B", "C", "z") else v for n, v in args.items()}
    loop = list(first.values())

    def ours() -> Tensor:
        return zk.selective_scan(**args, dt_softplus=True)[0]

    verify("selective_scan", ours()[..., :32], exact(args))
    verify("published loop", published_loop(*loop).transpose(1, 2)[..., :32], exact(args))
    updates = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
    with torch.no_grad():
        return (
            {"ours": ours, "bare loop": bare_loop(updates), "published loop": lambda: published_loop(*loop)},
            "ours",
            updates,
        )


def backward() -> tuple[Calls, str, int]:
    args = {n: v.requires_grad_() for n, v in scan_arguments(*SHAPE).items()}
    first = {
        n: (v.detach().transpose(1, 2).contiguous().requires_grad_() if n in ("u", "dt", "B", "C", "z") else v)
        for n, v in args.items()
    }
    y = zk.selective_scan(**args, dt_softplus=True)[0]
    other = published_loop(*first.values())
    up = torch.randn_like(y)
    up_first = up.transpose(1, 2).contiguous()

    def ours() -> list[Tensor]:
        return list(torch.autograd.grad(y, list(args.values()), up, retain_graph=True))

    def theirs() -> list[Tensor]:
        return list(torch.autograd.grad(other, list(first.values()), up_first, retain_graph=True))

    for name, a, b in zip(args, ours(), theirs(), strict=True):
        verify(
            f"gradient of {name}", a, (b.transpose(1, 2) if name in ("u", "dt", "B", "C", "z") else b).double(), 1e-4
        )
    return {"ours": ours, "autograd of the published loop": theirs}, "ours", SHAPE[1] * SHAPE[2] * SHAPE[3]


def path() -> tuple[Calls, str, int]:
    args = scan_arguments(*SHAPE)
    order = torch.randperm(SHAPE[1])
    verify("path", zk.selective_scan(**args, dt_softplus=True, path=order)[0][..., :32], exact(args, path=order))
    return (
        {
            "plain order": lambda: zk.selective_scan(**args, dt_softplus=True),
            "random path": lambda: zk.selective_scan(**args, dt_softplus=True, path=order),
            "reverse": lambda: zk.selective_scan(**args, dt_softplus=True, reverse=True),
        },
        "plain order",
        SHAPE[1] * SHAPE[2] * SHAPE[3],
    )


def four_paths() -> tuple[Calls, str, int]:
    """VMamba's first stage at 224 pixels: a map of 56 x 56, 192 channels, four orders."""
    batch, side, channels, state = 1, 56, 192, 16
    args = scan_arguments(batch, side * side, channels, state, 4)
    del args["z"]
    raster = torch.arange(side * side)
    column = raster.view(side, side).t().flatten()
    orders, flags = torch.stack([raster, column, raster, column]), [False, False, True, True]
    one = {
        n: v if n == "u" else v[0].contiguous() if n in ("A", "D", "dt_bias") else v[:, :, 0].contiguous()
        for n, v in args.items()
    }
    with_z = {**args, "z": torch.full((batch, side * side, channels), 50.0)}  # silu(50) = 50
    verify(
        "four paths", 50 * zk.selective_scan(**args, dt_softplus=True, path=orders, reverse=flags)[0][..., :32],
        exact(with_z, path=orders, reverse=flags),
    )  # fmt: skip
    return (
        {
            "one path": lambda: zk.selective_scan(**one, dt_softplus=True),
            "four paths": lambda: zk.selective_scan(**args, dt_softplus=True, path=orders, reverse=flags),
        },
        "one path",
        4 * side * side * channels * state,
    )


def step() -> tuple[Calls, str, int]:
    """Decoding with 512 sequences: the state, 50 MB, is read from memory and written back."""
    batch, channels, state = 512, 1536, 16
    args = scan_arguments(batch, 1, channels, state)
    one = {n: v[:, 0].contiguous() if n in ("u", "dt", "B", "C", "z") else v for n, v in args.items()}
    h = torch.zeros(batch, channels, state)
    verify("step", zk.selective_scan_step(**one, state=h, dt_softplus=True)[..., :32], exact(args)[:, 0])
    # Bytes: the state twice, A, three rows in and one out, B and C.
    numbers = 2 * h.numel() + channels * state + 4 * batch * channels + 2 * batch * state
    flat = torch.randn(numbers)
    return (
        {
            "ours": lambda: zk.selective_scan_step(**one, state=h, dt_softplus=True),
            "sum": lambda: flat.sum(),
        },
        "ours",
        batch * channels * state,
    )


def linear(kind: torch.dtype) -> Callable[[], tuple[Calls, str, int]]:
    def case() -> tuple[Calls, str, int]:
        out, features = 16384, 4096
        x, weight = torch.randn(1, features), torch.randn(out, features)
        scale = None
        if kind == torch.int8:
            scale = weight.abs().amax(1) / 127
            weight = (weight / scale[:, None]).round().to(torch.int8)
        weight = weight.to(kind)
        want = x.double() @ weight.double().t() * (1 if scale is None else scale.double())
        verify("linear", zk.linear(x, weight, scale=scale), want)
        flat = torch.randn(weight.numel() * weight.element_size() // 4)
        calls: Calls = {"ours": lambda: zk.linear(x, weight, scale=scale), "sum": lambda: flat.sum()}
        if kind != torch.int8:
            same = x.to(kind)
            calls["torch linear"] = lambda: F.linear(same, weight)
        return calls, "ours", out * features

    return case


def convolution() -> tuple[Calls, str, int]:
    _, length, channels, _ = SHAPE
    x, w, b = torch.randn(1, length, channels), torch.randn(channels, 4), torch.randn(channels)
    with zk.backend("reference"):
        want = zk.causal_conv1d(x.double(), w.double(), b.double(), activation="silu")[0]
    verify("causal_conv1d", zk.causal_conv1d(x, w, b, activation="silu")[0], want)

    def torch_conv() -> Tensor:
        y = F.conv1d(x.transpose(1, 2), w[:, None], b, padding=3, groups=channels)[..., :length]
        return F.silu(y).transpose(1, 2)

    verify("conv1d", torch_conv(), want)
    return (
        {"ours": lambda: zk.causal_conv1d(x, w, b, activation="silu"), "torch conv1d": torch_conv},
        "ours",
        length * channels,
    )


# Name: (the case, what its ratios are asked to be)
CASES: dict[str, tuple[Callable[[], tuple[Calls, str, int]], str]] = {
    "selective_scan forward": (forward, "published loop >= 250, bare loop >= 0.6"),
    "selective_scan backward": (backward, "autograd of the published loop >= 60"),
    "selective_scan along a path": (path, "random path <= 1.15"),
    "selective_scan four paths": (four_paths, "four paths <= 4.4"),
    "selective_scan_step": (step, "sum >= 0.67"),
    "linear float32": (linear(torch.float32), "sum >= 0.8"),
    "linear bfloat16": (linear(torch.bfloat16), "sum >= 0.8"),
    "linear int8": (linear(torch.int8), "sum >= 0.8"),
    "causal_conv1d": (convolution, "torch conv1d >= 1"),
}


def run(name: str, repeat: int) -> dict[str, Any]:
    make, goal = CASES[name]
    calls, unit, updates = make()
    times = interleaved(calls, repeat)
    base = statistics.median(times[unit])
    print(f"\n{name}   (goal: {goal})")
    rows = {}
    for peer, found in times.items():
        middle = statistics.median(found)
        quarter = len(found) // 4
        row = {
            "median_ms": 1e3 * middle,
            "spread_ms": [1e3 * found[quarter], 1e3 * found[-1 - quarter]],
            "least_ms": 1e3 * found[0],
            "ratio": middle / base,
            "ratio_of_least": found[0] / times[unit][0],
        }
        rows[peer] = row
        rate = f"{updates / middle / 1e9:7.2f} G/s"
        print(
            f"  {peer:32s} {row['median_ms']:9.3f} ms ({row['spread_ms'][0]:.3f} to {row['spread_ms'][1]:.3f}, least "
            f"{row['least_ms']:.3f}) {rate}   {row['ratio']:8.2f} times {unit} (least {row['ratio_of_least']:.2f})"
        )
    return {"goal": goal, "unit": unit, "updates": updates, "times": rows}


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), name
        )
    return {
        "processor": name,
        "instruction_set": _native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="run ssd.py and linear_scan.py as well")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    reason = _native.unavailable()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine(), "cases": {}}
    print("\n".join(f"{key}: {value}" for key, value in found["machine"].items()))
    for name in CASES:
        if options.only in name:
            found["cases"][name] = run(name, options.repeat)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.all:
        for script in ("ssd.py", "linear_scan.py"):
            print(f"\n== {script}", flush=True)
            subprocess.run([sys.executable, str(HERE / script), "--threads", str(options.threads)], check=True)


if __name__ == "__main__":
    main()
