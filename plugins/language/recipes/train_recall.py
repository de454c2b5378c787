"""Train HAX on a small joint recall and print how much it recalls: the original's recipe at a size for one CPU core.

    python plugins/language/recipes/train_recall.py mamba_hax mamba_sliding_window

For each named model: AdamW, learning rate 2e-3 after a linear warm-up, the loss of the asked values plus a tenth of the
key scores' loss. Items are drawn anew for each batch; recall is measured on items of another seed.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo_language.hax_task import PAD, JointRecall, recall_accuracy


def draw(task: JointRecall, count: int, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
    """(ids, asked), (count, length), of full tables."""
    items = [task.item(task.max_n_context, task.max_n_key, random) for _ in range(count)]
    return torch.stack([ids for ids, _ in items]), torch.stack([asked for _, asked in items])


def train(name: str, task: JointRecall, steps: int, batch: int, keys: int) -> float:
    """The share of asked values that the trained model puts first, on 200 tables of another seed."""
    torch.manual_seed(1)
    model = zoo.create(name, sparse_keys=keys, num_hash=4, data_max_length=task.length).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, total_iters=max(1, steps // 20))
    random = np.random.RandomState(1)
    for _ in range(steps):
        ids, asked = draw(task, batch, random)
        optimiser.zero_grad()
        model.training_loss(ids, asked, attention_mask=ids != PAD).backward()
        optimiser.step()
        warm_up.step()
    ids, asked = draw(task, 200, np.random.RandomState(2))
    with torch.no_grad():
        return recall_accuracy(model.eval()(ids, attention_mask=ids != PAD), ids, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Cards of HAX, such as mamba_hax or mamba_sliding_window.")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--values", type=int, default=4)
    parser.add_argument("--sparse-keys", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    task = JointRecall(options.contexts, options.keys, options.values)
    print(f"tables of {options.contexts} x {options.keys}, {task.length} tokens, chance {1 / options.values:.3f}")
    for name in options.models:
        began = time.perf_counter()
        accuracy = train(name, task, options.steps, options.batch_size, options.sparse_keys)
        print(
            f"{name}: recall {accuracy:.4f} after {options.steps} steps ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
