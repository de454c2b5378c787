"""ssd, mLSTM, sLSTM and their steps on a CPU against published implementations, in one run.

    python benchmarks/ssd.py [--threads 2] [--repeat 7] [--lengths 256 2048 8192] [--json benchmarks/results/ssd.json]

Prints milliseconds (the least of ``--repeat`` interleaved calls, so that a noisy machine disturbs all alike) and their
ratio to ours. Peers of ssd: the published chunk formula (mamba_ssm's ``ssd_minimal_discrete``, its einsums written anew
from the paper's listing 1, chunk 64) and the torch path of transformers' Mamba-2. mambapy has no CPU path of its own
for Mamba-2: it calls mamba_ssm's GPU kernels. mLSTM: the quadratic parallel form. sLSTM: the same cell as torch
operators, step by step (as NX-AI/xlstm's vanilla backend). Decoding steps: the update as torch operators, and two
bounds, the state multiplied by one in place (it may lie in a cache) and a sum of as many bytes from memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import zoo_kernels
from zoo_kernels import mlstm, slstm, ssd, ssd_step

BATCH, HEADS, HEADDIM, STATE = 1, 24, 64, 128  # a Mamba-2 130m layer
Calls = dict[str, Callable[[], Any]]


def least(calls: Calls, repeat: int) -> dict[str, float]:
    """Least milliseconds of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(found) for name, found in times.items()}


def segment_sums(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool).tril(-1)
    sums = x[..., None].expand(*x.shape, n).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def published_chunks(x, log_decay, B, C, chunk=64):
    """Listing 1 of arXiv 2405.21060: all chunks at once."""
    x, log_decay, B, C = (t.unflatten(1, (-1, chunk)) for t in (x, log_decay, B, C))
    log_decay = log_decay.permute(0, 3, 1, 2)
    total = log_decay.cumsum(-1)
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(log_decay).exp(), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (total[..., -1:] - total).exp(), x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = segment_sums(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, total.exp())).flatten(1, 2)


def ssd_calls(length: int) -> tuple[list[torch.Tensor], dict[str, Callable[..., torch.Tensor]]]:
    x, dt = torch.randn(BATCH, length, HEADS, HEADDIM), torch.randn(BATCH, length, HEADS)
    B, C = 0.3 * torch.randn(2, BATCH, length, 1, STATE)
    tensors = [x, dt, -8 * torch.rand(HEADS) - 1, B, C, torch.randn(HEADS), torch.full((HEADS,), -3.0)]

    def ours(x, dt, A, B, C, D, bias):
        return ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)[0]

    def minimal(x, dt, A, B, C, D, bias):
        d = F.softplus(dt + bias)
        B, C = (t.expand(-1, -1, HEADS, -1) for t in (B, C))
        return published_chunks(x * d[..., None], d * A, B, C) + D[:, None] * x

    calls = {"ours": ours, "minimal": minimal}
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        print("  transformers has no mamba2_chunk_scan here: left out")
        return tensors, calls

    def transformers(x, dt, A, B, C, D, bias):
        y = mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=256, D=D, z=None, return_final_states=False, dt_bias=bias, dt_softplus=True,
            initial_states=None, dt_limit=(0.0, float("inf")),
        )  # fmt: skip
        return y.reshape(x.shape)

    return tensors, calls | {"transformers": transformers}


def report(results: dict[str, Any], name: str, times: dict[str, float]) -> None:
    results[name] = times
    row = ", ".join(f"{k} {v:.3g} ms ({v / times['ours']:.3g}x)" for k, v in times.items())
    print(f"{name}: {row}", flush=True)


def bench_ssd(results: dict[str, Any], length: int, repeat: int) -> None:
    tensors, calls = ssd_calls(length)
    with torch.no_grad():
        found = {name: f(*tensors) for name, f in calls.items()}
        for name, y in found.items():
            error = float((y - found["ours"]).abs().max() / found["ours"].abs().max())
            if not error < 1e-4:
                raise SystemExit(f"{name} differs from ours by {error}")
        report(results, f"ssd forward {length}", least({n: lambda f=f: f(*tensors) for n, f in calls.items()}, repeat))
        path = torch.randperm(length)
        walked = {
            "ours": lambda: ssd(*tensors[:6], dt_bias=tensors[6], dt_softplus=True),
            "along a path": lambda: ssd(*tensors[:6], dt_bias=tensors[6], dt_softplus=True, path=path),
        }
        report(results, f"ssd path {length}", least(walked, repeat))
    leaves = [t.requires_grad_() for t in tensors]
    weight = torch.randn_like(leaves[0])
    graphs = {name: f(*leaves) for name, f in calls.items()}
    back = {n: lambda y=y: torch.autograd.grad(y, leaves, weight, retain_graph=True) for n, y in graphs.items()}
    report(results, f"ssd backward {length}", least(back, max(repeat // 2, 2)))


def bench_steps(results: dict[str, Any], repeat: int, heads: int = HEADS, batch: int = 1) -> None:
    """One layer's step at the size of mamba2-130m (24 heads) or 2.7b (80)."""
    x, dt = torch.randn(batch, heads, HEADDIM), torch.randn(batch, heads)
    B, C = torch.randn(2, batch, 1, STATE)
    A, D, state = -torch.rand(heads), torch.randn(heads), torch.zeros(batch, heads, HEADDIM, STATE)

    def eager():  # the update as torch operators
        d = F.softplus(dt)
        state.mul_(torch.exp(d * A)[..., None, None]).add_((d[..., None] * x)[..., None] * B[:, :, None])
        return (state * C[:, :, None]).sum(-1) + D[:, None] * x

    numbers = 2 * state.numel()  # read and written
    memory = torch.zeros(max(numbers, 1 << 27))  # more than any cache holds
    place = itertools.cycle(range(0, memory.numel() - numbers + 1, numbers))

    def bound():  # a sum of as many bytes, which are in no cache
        start = next(place)
        return memory[start : start + numbers].sum()

    calls = {
        "as many bytes of memory, summed": bound,
        "ours": lambda: ssd_step(x, dt, A, B, C, D, state=state, dt_softplus=True),
        "torch operators": eager,
        "state read and written once (mul_)": lambda: state.mul_(1.0),
    }
    report(results, f"ssd step, {heads} heads, {batch} sequences", least(calls, 50 * repeat))


def parallel_mlstm(q, k, v, i, f):
    c = F.logsigmoid(f).cumsum(1)
    below = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    logs = (c[:, :, None] - c[:, None] + i[:, None]).masked_fill(~below, -torch.inf)
    m = logs.amax(2, keepdim=True)
    S = torch.einsum("bthn,bshn->btsh", q, k) * q.shape[-1] ** -0.5 * (logs - m).exp()
    total = torch.maximum(S.sum(2).abs(), (-m[:, :, 0]).exp()) + 1e-6
    return torch.einsum("btsh,bshp->bthp", S, v) / total[..., None]


def bench_xlstm(results: dict[str, Any], repeat: int) -> None:
    q, k, v = torch.randn(3, 1, 1024, 4, 128)
    i, f = torch.randn(2, 1, 1024, 4)
    args = [q, k, v, i, f]
    calls = {"ours": lambda: mlstm(*args), "parallel form": lambda: parallel_mlstm(*args)}
    with torch.no_grad():
        report(results, "mlstm forward 1024", least(calls, repeat))
    gates, recurrent = torch.randn(4, 256, 4, 4, 64), 0.05 * torch.randn(4, 64, 4, 64)
    leaves = [gates.requires_grad_(), recurrent.requires_grad_()]

    def train(backend: str) -> Any:
        with zoo_kernels.backend(backend):
            return torch.autograd.grad(slstm(*leaves)[0].sum(), leaves)

    def forward(backend: str) -> Any:
        with torch.no_grad(), zoo_kernels.backend(backend):
            return slstm(*leaves)

    few = max(repeat // 2, 2)
    report(
        results,
        "slstm forward 256",
        least({"ours": lambda: forward("auto"), "torch operators": lambda: forward("reference")}, few),
    )
    report(
        results,
        "slstm forward and backward 256",
        least({"ours": lambda: train("auto"), "torch operators": lambda: train("reference")}, few),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 8192], help="multiples of 64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"zoo_kernels {zoo_kernels.status()['native']}; torch {torch.__version__}, {options.threads} threads, float32"
    )
    results: dict[str, Any] = {}
    for length in options.lengths:
        bench_ssd(results, length, options.repeat)
    for heads in (24, 80):
        for batch in (1, 16):
            bench_steps(results, options.repeat, heads, batch)
    bench_xlstm(results, options.repeat)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "milliseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
