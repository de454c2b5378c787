"""A patch through SegMamba and U-Mamba: the scan, the whole network and peak memory, against the reference operators.

    python benchmarks/medical.py segmamba_brats --threads 2 --wall --json benchmarks/results/medical.json
    python benchmarks/medical.py umamba_enc_3d --threads 2 --wall --parts network  # two million steps: two minutes

The peer is the same network with the same weights on ``zoo_kernels.backend("reference")``, in the same process: the
operators are their definitions in plain torch, one step after another, and everything else is torch's own modules, one
call after another. Ours is ``model(image)`` in inference mode as a user calls it: the library's operators, and the
ways in little memory of ``zoo_medical.lean``. Outputs must agree (relative error below 1e-3), or nothing is reported.
*Scan* is the time inside selective scan and causal convolution, gates included. Seconds are the process's CPU time
unless ``--wall`` is given: on one thread, other work on the machine then disturbs little. Peak memory is the growth of
the resident set during a pass, of the whole network and of the first stage's Mamba layer alone (``layer``), where the
convolutions at full size do not hide the scan.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import _give_back, _peak, _reset_peak, _resident

import zoo
import zoo_kernels
from zoo.layers import mamba, path_scan
from zoo_medical import segmamba


def build(name: str, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    slices = {"slices": [size // 2, size // 4, size // 8, size // 16]} if name.startswith("segmamba") else {}
    patch = {"input_size": [size] * 3} if name.startswith("umamba_enc") else {}
    model = zoo.create(name, **slices, **patch).eval()
    return model, torch.randn(1, model.in_chans, size, size, size)


def first_layer(model: torch.nn.Module, name: str, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The first Mamba layer and an input of its shape."""
    if name.startswith("segmamba"):
        layer, side = model.vit.stages[0][0], size // 2
        return layer, torch.randn(1, layer.norm.normalized_shape[0], side, side, side)
    if len(model.encoder.mamba_layers):
        layer = model.encoder.mamba_layers[0]
        return layer, torch.randn(1, layer.dim, size, size, size)
    side = size // max(model.reduction)
    return model.mamba_layer, torch.randn(1, model.mamba_layer.dim, side, side, side)


class Clock:
    """Time inside the operators, taken around their public functions: a profile of the reference would hold millions
    of events."""

    def __init__(self, now: Any) -> None:
        self.now, self.seconds = now, 0.0

    def timed(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return function(*args, **options)
            finally:
                self.seconds += self.now() - began

        return call


def run(model: torch.nn.Module, x: torch.Tensor, backend: str, now: Any) -> dict[str, Any]:
    """One pass: seconds in the operators, of the whole, megabytes, and the output."""
    clock = Clock(now)
    kept = [
        (module, name, getattr(module, name))
        for module in (mamba, path_scan, segmamba)
        for name in ("selective_scan", "causal_conv1d")
        if hasattr(module, name)
    ]
    for module, name, function in kept:
        setattr(module, name, clock.timed(function))
    gc.collect()
    _give_back()
    before = _resident()
    _reset_peak()
    try:
        with torch.inference_mode(), zoo_kernels.backend(backend):
            began = now()
            output = model(x)
            whole = now() - began
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
    output = output if isinstance(output, torch.Tensor) else output[0]
    return {"scan": clock.seconds, "whole": whole, "peak_mb": max(_peak() - before, 0.0), "output": output}


def compared(model: torch.nn.Module, x: torch.Tensor, repeat: int, now: Any) -> dict[str, float]:
    """Ours, the reference, and the ratios; the best of ``repeat`` passes of ours counts."""
    passes = [run(model, x, "auto", now) for _ in range(repeat)]
    slow = run(model, x, "reference", now)
    error = ((passes[-1]["output"] - slow["output"]).abs().max() / slow["output"].abs().max()).item()
    if not error < 1e-3:
        raise SystemExit(f"the output differs from the reference's by {error:.1e}: not reported")
    scan, whole = (min(p[k] for p in passes) for k in ("scan", "whole"))
    peak = max(p["peak_mb"] for p in passes)
    return {
        "error": error, "scan_seconds": scan, "reference_scan_seconds": slow["scan"], "seconds": whole,
        "reference_seconds": slow["whole"], "peak_mb": peak, "reference_peak_mb": slow["peak_mb"],
        "scan_times_faster": slow["scan"] / scan, "times_faster": slow["whole"] / whole,
        "peak_share": peak / slow["peak_mb"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="segmamba_brats")
    parser.add_argument("--size", type=int, default=128, help="side of the patch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2, help="passes with the native operators")
    parser.add_argument("--parts", nargs="+", default=["layer", "network"], choices=["layer", "network"])
    parser.add_argument("--wall", action="store_true", help="wall-clock time instead of the process's CPU time")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    now = time.perf_counter if o.wall else time.process_time
    command = "python benchmarks/medical.py " + " ".join(sys.argv[1:])
    row: dict[str, Any] = {"model": o.model, "size": o.size, "threads": o.threads}
    row |= {"clock": "wall" if o.wall else "cpu", "command": command.partition(" --json")[0]}
    for part in o.parts:
        model, x = build(o.model, o.size)
        if part == "layer":
            model, x = first_layer(model, o.model, o.size)
        row[part] = compared(model, x, o.repeat, now)
        del model, x
    print(json.dumps(row, indent=1))
    if o.json is not None:
        rows = json.loads(o.json.read_text()) if o.json.exists() else []
        rows = [r for r in rows if r["command"] != row["command"]] + [row]
        o.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
