"""Train the demo forecaster on generated series (see series.py) and measure it on series that it has not seen.

    python plugins/time_series/recipes/train_series.py --minutes 20

writes the checkpoint into the plugin (half precision) and prints its errors beside those of three baselines, which
belong on the card: the last value, the last season repeated (its period found in the window by autocorrelation), and a
linear map from window to forecast, fitted to the same training series by ridge regression.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import series
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo_time_series.baselines import last_value, ridge, seasonal_naive

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_time_series"
COLUMNS, LENGTH = 4, 600


def windows(data: Tensor, count: int, columns: int, lag: int, horizon: int, random: torch.Generator) -> Tensor:
    """Windows (count, lag + horizon, columns) of random tables and columns, each scaled by its own history."""
    steps = lag + horizon
    which = torch.randint(len(data), (count,), generator=random)
    start = torch.randint(data.shape[1] - steps + 1, (count,), generator=random)
    some = torch.randperm(data.shape[2], generator=random)[:columns]
    found = torch.stack([data[i, s : s + steps] for i, s in zip(which.tolist(), start.tolist(), strict=True)])
    found = found[..., some]
    mean, std = found[:, :lag].mean(1, keepdim=True), found[:, :lag].std(1, keepdim=True)
    return (found - mean) / (std + 1e-6)


def errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {"mse": float((found - expected).square().mean()), "mae": float((found - expected).abs().mean())}


def measure(model: torch.nn.Module, train: Tensor, count: int = 500) -> dict[str, dict[str, float]]:
    """Errors on windows of unseen tables, in deviations of each window's history; also column by column."""
    lag, horizon = model.lag, model.horizon
    data = torch.from_numpy(series.tables(count, lag + horizon + 60, COLUMNS, seed=2))
    test = windows(data, 2 * count, COLUMNS, lag, horizon, torch.Generator().manual_seed(3))
    x, y = test[:, :lag], test[:, lag:]
    alone = x.transpose(1, 2).reshape(-1, lag, 1)
    with torch.inference_mode():
        together = torch.cat([model(piece) for piece in x.split(100)])
        single = torch.cat([model(piece) for piece in alone.split(400)])
    fit = windows(train, 8000, COLUMNS, lag, horizon, torch.Generator().manual_seed(4))
    return {
        "model, four columns together": errors(together, y),
        "model, each column alone": errors(single.reshape(len(y), COLUMNS, horizon).transpose(1, 2), y),
        "last value": errors(last_value(x, horizon), y),
        "last season": errors(seasonal_naive(x, horizon), y),
        "linear": errors(ridge(fit[:, :lag], fit[:, lag:], x), y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--tables", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=64, help="columns of all windows of a step together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()

    train = torch.from_numpy(series.tables(arguments.tables, LENGTH, COLUMNS, seed=1))
    torch.manual_seed(arguments.seed)
    random = torch.Generator().manual_seed(arguments.seed)
    model = zoo.create("tsm2_micro").train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    began, step, part = time.process_time(), 0, 0.0
    while part < 1:
        part = min((time.process_time() - began) / (60 * arguments.minutes), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1.0, step / 100) * (0.5 + 0.5 * np.cos(np.pi * part))
        columns = int(torch.randint(1, COLUMNS + 1, (), generator=random))
        batch = windows(train, arguments.rows // columns, columns, model.lag, model.horizon, random)
        loss = model.loss(batch[:, : model.lag], batch[:, model.lag :])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f"step {step}, {part:.0%}: loss {float(loss.detach()):.3f}", flush=True)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})  # what is measured is what is stored
    print(json.dumps({"steps": step, **measure(model.eval(), train)}, indent=1))
    if not arguments.dry_run:
        (PLUGIN / "demo").mkdir(exist_ok=True)
        save_file(state, PLUGIN / "demo" / "tsm2_micro.series.safetensors")


if __name__ == "__main__":
    main()
