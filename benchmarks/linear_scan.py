"""linear_scan, gated linear attention, the S4 kernel generators, long_conv and the norm against published ones, in one
run.

    pip install --no-deps mambapy accelerated-scan
    python benchmarks/linear_scan.py [--threads 2] [--repeat 5] [--json benchmarks/results/linear_scan.json]

Prints milliseconds (the median of ``--repeat`` calls, interleaved so that a noisy machine disturbs all alike) and the
ratio to ours. Peers: mambapy's ``pscan``, accelerated-scan's ``ref.scan``; for the S4 sums, the einsums over all steps
that state-spaces/s4 falls back on (``log_vandermonde_naive``, ``cauchy_naive``); for the norm, ``torch.nn.functional``.
Gated linear attention (one decay per key channel) stands against the recurrence as a loop and its chunked form, both in
torch (``reference`` and ``chunked`` of ``zoo_kernels.ops.linear_attention``; arXiv 2312.06635, section 4).
The limit of the linear scan is the time of one torch call that moves the same bytes: ``torch.add(a, x)``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import zoo_kernels
from zoo_kernels import cauchy, gated_rms_norm, linear_scan, long_conv, unit_roots, vandermonde_kernel
from zoo_kernels.ops.linear_attention import chunked, reference

Calls = dict[str, Callable[[], object]]


def interleaved(calls: Calls, repeat: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def with_backward(call: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of a sum of the outputs."""

    def run() -> object:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves).real.sum(), leaves)

    return run


def scans(backward: bool, shape: tuple[int, int, int]) -> Calls:
    length = shape[1]
    x, a = torch.randn(shape), torch.rand(shape) * 0.2 + 0.8
    wrap = with_backward if backward else (lambda f, *t: lambda: f(*t))
    # mambapy scans (batch, length, channels, states), accelerated-scan (batch, channels, length); each gets its layout.
    last, axes = [t.transpose(1, 2).contiguous() for t in (a, x)], [t[..., None].contiguous() for t in (a, x)]
    calls: Calls = {"ours": wrap(lambda a, x: linear_scan(x, a)[0], a, x)}
    if not backward:
        calls["limit: torch.add of the same arrays"] = lambda: torch.add(a, x)
    try:
        from mambapy.pscan import pscan

        calls["mambapy pscan"] = wrap(pscan, *axes)
    except ImportError:
        print("  (mambapy is not installed: pip install --no-deps mambapy)")
    try:
        from accelerated_scan.ref import scan

        if length & (length - 1) == 0:
            calls["accelerated-scan ref.scan"] = wrap(scan, *last)
    except ImportError:
        print("  (accelerated-scan is not installed: pip install --no-deps accelerated-scan)")
    return calls


def complex_scans(shape: tuple[int, int, int]) -> Calls:
    x = torch.randn(shape, dtype=torch.complex64)
    a = torch.polar(torch.rand(shape[-1]) * 0.2 + 0.8, torch.rand(shape[-1]) * 6)

    def loop() -> torch.Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(shape[1]):
            h = a * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1)

    return {"ours": lambda: linear_scan(x, a)[0], "a loop of torch operators": loop}


def gated_attention(backward: bool, length: int, heads: int, keys: int, values: int) -> Calls:
    q, k, v = (torch.randn(1, length, heads, n) for n in (keys, keys, values))
    decay = F.logsigmoid(torch.randn(1, length, heads, keys)) / 16
    leaves = [t.requires_grad_(backward) for t in (v, decay, k, q)]
    arguments = (*leaves, None, None, None, False)
    dy, dfinal = torch.randn(1, length, heads, values), torch.zeros(1, heads, values, keys)

    def ours() -> object:
        y, _ = zoo_kernels.linear_attention(q, k, v, decay)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    def chunks() -> object:
        y = chunked.forward(*arguments)
        return chunked.backward((dy, dfinal), arguments, (), [True] * 5) if backward else y

    def loop() -> object:
        y, _ = reference.forward(*arguments)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    return {"ours": ours, "the chunked form in torch": chunks, "a loop of torch operators": loop}


def vandermonde(channels: int, N: int, length: int) -> Calls:
    c = torch.randn(1, channels, N, dtype=torch.complex64)
    d = torch.complex(-torch.rand(channels, N) * 0.05, torch.rand(channels, N))

    def naive() -> torch.Tensor:
        powers = torch.exp(d[..., None] * torch.arange(length))
        return 2 * torch.einsum("chn,hnl->chl", c, powers).real

    return {"ours": lambda: vandermonde_kernel(c, d, length), "naive Vandermonde": naive}


def cauchy_sums(channels: int, N: int, length: int) -> Calls:
    v = torch.randn(4, channels, N, dtype=torch.complex64)
    a = torch.complex(-torch.rand(channels, N) * 0.05 - 0.01, torch.rand(channels, N))
    p, q = unit_roots(length)
    z = p / q

    def naive() -> torch.Tensor:
        both, poles = torch.cat([v, v.conj()], -1), torch.cat([a, a.conj()], -1)
        return (both[..., None] / (z - poles[..., None])).sum(-2)

    return {"ours": lambda: cauchy(v, a, p, q), "naive Cauchy": naive}


def convolutions(batch: int, length: int, channels: int) -> Calls:
    x, k = torch.randn(batch, length, channels), torch.randn(channels, length)
    spectrum = zoo_kernels.kernel_spectrum(k, length)

    def plain() -> torch.Tensor:  # FFTConv of state-spaces/s4, channels first
        u, n = x.transpose(1, 2), 2 * length
        return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., :length]

    return {
        "ours, kernel transformed before": lambda: long_conv(x, spectrum)[0],
        "ours": lambda: long_conv(x, k)[0],
        "S4's FFTConv": plain,
    }


def norms(backward: bool, rows: int, dim: int) -> Calls:
    x, z, w = torch.randn(rows, dim), torch.randn(rows, dim), torch.randn(dim)
    wrap = with_backward if backward else (lambda f, *t: lambda: f(*t))
    return {
        "ours": wrap(lambda x, z, w: gated_rms_norm(x, z, w), x, z, w),
        "torch rms_norm(x * silu(z))": wrap(lambda x, z, w: F.rms_norm(x * F.silu(z), (dim,), w, 1e-5), x, z, w),
    }


CASES: dict[str, Callable[[], Calls]] = {
    "linear_scan forward (1, 1024, 1536)": lambda: scans(False, (1, 1024, 1536)),
    "linear_scan forward (8, 2048, 512)": lambda: scans(False, (8, 2048, 512)),
    "linear_scan forward + backward (1, 1024, 1536)": lambda: scans(True, (1, 1024, 1536)),
    "linear_scan forward (1, 65536, 8)": lambda: scans(False, (1, 65536, 8)),
    "linear_scan forward + backward (1, 65536, 8)": lambda: scans(True, (1, 65536, 8)),
    "linear_scan complex, shared a (4, 1024, 256)": lambda: complex_scans((4, 1024, 256)),
    "linear_attention per channel (1, 1024, 4 heads, 128 x 256)": lambda: gated_attention(False, 1024, 4, 128, 256),
    "linear_attention per channel, forward + backward (1, 1024, 4 heads, 64 x 128)": lambda: gated_attention(
        True, 1024, 4, 64, 128
    ),
    "vandermonde_kernel (256, 32, 4096)": lambda: vandermonde(256, 32, 4096),
    "cauchy (256, 32, 4096)": lambda: cauchy_sums(256, 32, 4096),
    "long_conv (4, 4096, 256)": lambda: convolutions(4, 4096, 256),
    "gated_rms_norm (4096, 1536)": lambda: norms(False, 4096, 1536),
    "gated_rms_norm forward + backward (4096, 1536)": lambda: norms(True, 4096, 1536),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the figures to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    isa = zoo_kernels.status()["native"].get("isa")
    print(f"{platform.machine()}, {isa}, torch {torch.__version__}, {options.threads} threads, float32")
    report: dict[str, dict[str, float]] = {}
    for name, make in CASES.items():
        if options.only not in name:
            continue
        print(name)
        report[name] = interleaved(make(), options.repeat)
        ours = next(iter(report[name].values()))
        for label, taken in report[name].items():
            ratio = "" if math.isclose(taken, ours) else f"   {taken / ours:7.2f} x"
            print(f"  {taken:10.2f} ms  {label}{ratio}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {"threads": options.threads, "isa": isa, "torch": torch.__version__, "ms": report}, file, indent=1
            )


if __name__ == "__main__":
    main()
