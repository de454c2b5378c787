"""A training step with ``set_grad_checkpointing`` and without: peak memory and time of the same model in one process.

    python benchmarks/checkpointing.py mamba_130m --length 512
    python benchmarks/checkpointing.py vim_tiny_patch16_224 --batch 8

The published size with random weights in float32, in training mode: forward, a loss and backward; gradients lie in
memory before, as an optimiser leaves them. Peak memory is the growth of the resident set during a step, that is what
lies between the weights and the gradients. The gradients of both must agree (1e-4 of the largest), or nothing is
reported. Time is the process's CPU time, the shorter of two steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch
from models import _give_back, _peak, _reset_peak, _resident
from torch import Tensor, nn

import zoo


def inputs(model: nn.Module, batch: int, length: int) -> Tensor:
    if hasattr(model, "vocab_size"):
        return torch.randint(model.vocab_size, (batch, length))
    return torch.randn(batch, model.in_chans, *model.img_size)


def step(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds and growth in megabytes of one step; gradients are left in the parameters."""
    model.zero_grad(set_to_none=False)
    gc.collect()
    _give_back()
    before = _resident()
    _reset_peak()
    began = time.process_time()
    torch.manual_seed(0)
    model(x).float().square().mean().backward()
    return {"seconds": time.process_time() - began, "peak_mb": _peak() - before}


def measured(model: nn.Module, x: Tensor, enable: bool) -> tuple[dict[str, float], list[Tensor]]:
    model.set_grad_checkpointing(enable)
    steps = [step(model, x) for _ in range(2)]
    found = {"seconds": min(s["seconds"] for s in steps), "peak_mb": max(s["peak_mb"] for s in steps)}
    return found, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mamba_130m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    model = zoo.create(o.model).train()
    x = inputs(model, o.batch, o.length)
    model(x).float().square().mean().backward()  # gradients lie in memory from here on
    plain, one = measured(model, x, False)
    again, two = measured(model, x, True)
    largest = max(g.abs().max() for g in one)
    error = max((a - b).abs().max() for a, b in zip(one, two, strict=True)) / largest
    if not error < 1e-4:
        raise SystemExit(f"the gradients differ by {error:.1e} of the largest: not reported")
    row: dict[str, Any] = {"model": o.model, "input": list(x.shape), "kept": plain, "recomputed": again}
    row |= {"memory_share": again["peak_mb"] / plain["peak_mb"], "times_as_long": again["seconds"] / plain["seconds"]}
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
