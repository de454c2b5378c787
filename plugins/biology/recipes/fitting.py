"""What the three recipes share: a training loop, and writing a demo checkpoint."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DEMO = Path(__file__).parents[1] / "src" / "zoo_biology" / "demo"


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.1,
    every: int = 50,
) -> None:
    """AdamW with betas 0.9, 0.95, warm-up over a twentieth, cosine to a tenth, gradients clipped to norm 1."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    warm = max(steps // 20, 1)

    def rate(step: int) -> float:
        done = (step - warm) / max(steps - warm, 1)
        return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    began, mean = time.time(), 0.0
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % every == 0:
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {time.time() - began:.0f} s", flush=True)
    model.eval()


def write(model: nn.Module, name: str) -> Path:
    """The weights in float16 (they measure the same, and are measured as written), with what a card needs to know."""
    DEMO.mkdir(parents=True, exist_ok=True)
    path = DEMO / name
    state = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    print(f"{path.name}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}, {path.stat().st_size} bytes")
    return path
