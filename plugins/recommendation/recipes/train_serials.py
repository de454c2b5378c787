"""Train the demo recommender: people who follow serials (see serials.py), whose best possible score is known.

    uv run python plugins/recommendation/recipes/train_serials.py

writes the checkpoint, its item names and sample histories into the plugin, and prints the test scores beside the best
possible ones, which belong on the card.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import serials
import torch
from safetensors.torch import save_file

import zoo
from zoo_recommendation.protocol import Ranking, Samples, prepare, split
from zoo_recommendation.training import Settings, evaluate, fit

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_recommendation"


def best_possible(samples: Samples, label: list[str]) -> dict[str, float]:
    """The scores of ranking by the true chances, given each sample's history."""
    number = {name: i for i, name in enumerate(serials.names(), start=1)}
    item_id = {token: i for i, token in enumerate(label)}
    ranking = Ranking((10, 20))
    for row in range(len(samples)):
        history = samples.table.item[samples.start[row] : samples.end[row]]
        chance = serials.chances([number[label[i]] for i in history])
        scores = torch.full((1, len(label)), -1.0)
        for name, true in number.items():
            if name in item_id:
                scores[0, item_id[name]] = float(chance[true])
        ranking.add(scores, torch.tensor([samples.target[row]]))
    return ranking.result()


def report(row: dict[str, float]) -> None:
    print(f"epoch {row['epoch']:2} {row['seconds']:.0f} s NDCG@10 {row['ndcg@10']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba4rec_micro")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()

    table = prepare(*serials.simulate(arguments.users, seed=arguments.seed))
    torch.manual_seed(arguments.seed)
    model = zoo.create(arguments.model, n_items=table.n_items)
    # No window: the best recommender reads whole histories, and so do the samples (at most 60 items).
    train, valid, test = split(table, model.max_length)
    print(f"{len(table.user)} interactions, {table.n_items - 1} items, {len(train)} training samples")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.lr,
            patience=5,
            seed=arguments.seed,
        )
        fit(model, train, valid, folder, settings, on_epoch=report)
    model.half().float()  # measured as stored
    scores = evaluate(model, test)
    best = best_possible(test, table.item_tokens)
    print(json.dumps({"model": scores, "best possible": best}, indent=1))
    if arguments.dry_run:
        return

    demo = PLUGIN / "demo"
    demo.mkdir(exist_ok=True)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, demo / "mamba4rec_micro.serials.safetensors")
    (demo / "serials_items.txt").write_text("\n".join(table.item_tokens[1:]) + "\n", encoding="utf-8")
    samples = demo / "samples"
    samples.mkdir(exist_ok=True)
    for row in np.linspace(0, len(test) - 1, 3).astype(int):
        rows = slice(test.start[row], test.end[row])
        user = table.user_tokens[test.user[row]]
        with (samples / f"history_{user}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["item", "timestamp"])
            for item, time in zip(table.item[rows], table.time[rows], strict=True):
                writer.writerow([table.item_tokens[item], int(time)])


if __name__ == "__main__":
    main()
