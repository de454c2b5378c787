"""Serpent and Contrast against themselves on the reference operators, and against a network of window attention.

    python benchmarks/restoration.py --threads 2 --json benchmarks/results/restoration.json

*operators*: a forward pass of `serpent` (its default, 5.2 M parameters) on 3 x 256 x 256 and of `contrast_x2` with 60
channels, 2 groups of 2 blocks on 3 x 64 x 64, against the same network on the reference operators
(`zoo_kernels.backend("reference")`); outputs must agree to 1e-4.

*size*: time and memory of one pass by the side of the image, `serpent` beside transformers' Swin2SR in its light form
(60 channels, 4 stages of 6 blocks, windows of 8, 1 M parameters; same size out, its enlargement left out). Memory is
what the peak of the process lies above what it held before the pass (Linux), a process for each.

Runs alternate, and the best of each is compared. Weights are random: what is measured is cost, not quality.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import zoo
import zoo_kernels


def best(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def network(name: str) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    if name == "swin2sr":
        from transformers import Swin2SRConfig, Swin2SRModel

        model = Swin2SRModel(
            Swin2SRConfig(embed_dim=60, depths=[6] * 4, num_heads=[6] * 4, window_size=8, mlp_ratio=2.0, upscale=1)
        ).eval()
        return lambda x: model(x).last_hidden_state
    if name == "contrast":
        return zoo.create("contrast_x2", dim=60, groups=2, blocks=2).eval()
    return zoo.create(name).eval()


def operators(rounds: int) -> dict[str, object]:
    rows: dict[str, object] = {}
    for name, side in (("serpent", 256), ("contrast", 64)):
        run, x = network(name), torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))

        def plain(run=run, x=x) -> Tensor:
            with zoo_kernels.backend("reference"):
                return run(x)

        with torch.inference_mode():
            a, b = run(x), plain()
            error = float((a - b).abs().max() / b.abs().max())
            assert error < 1e-4, f"{name}: relative error {error}"
            seconds = best({"ours": functools.partial(run, x), "reference": plain}, rounds)
        rows[f"{name} {side} x {side}"] = {
            "milliseconds": round(1000 * seconds["ours"], 1),
            "times on the reference operators": round(seconds["reference"] / seconds["ours"], 1),
        }
    return rows


def memory(field: str) -> float:
    """Megabytes from Linux' own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def one(name: str, side: int) -> dict[str, float]:
    """Seconds and megabytes of the first pass at this size, in this process alone."""
    run = network(name)
    with torch.inference_mode():
        run(torch.rand(1, 3, 16, 16))  # libraries and their caches
        x = torch.rand(1, 3, side, side)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, began = memory("VmRSS"), time.perf_counter()
        run(x)
        return {"seconds": round(time.perf_counter() - began, 3), "MB": round(memory("VmHWM") - before)}


def sizes(sides: list[int], threads: int) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for side in sides:
        for name in ("serpent", "swin2sr"):
            said = subprocess.run(
                [sys.executable, __file__, "--one", name, str(side), "--threads", str(threads)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            found.setdefault(f"{side} x {side}", {})[name] = json.loads(said.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]))))
        return
    found = {
        "threads": arguments.threads,
        "torch": torch.__version__,
        "operators": operators(arguments.rounds),
        "size": sizes(arguments.sides, arguments.threads),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
