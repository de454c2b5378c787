"""Train the demo on generated long trees (see broadcast.py), and the same network without its Mamba beside it.

    uv run python plugins/graph/recipes/train_demo.py

writes the checkpoint, its class names and a sample folder into the plugin, and prints the figures of the card: the
share of nodes that name the right colour on graphs of another seed, all of them and those more than six hops away.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import broadcast
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import zoo
from zoo_graph.training import Epoch, answers, fit

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_graph"


def figures(model: nn.Module, count: int = 200, seed: int = 3) -> dict[str, float]:
    graphs, distance = broadcast.trees(count, seed)
    output, target = answers(model, graphs)
    assert target is not None
    right = (output.argmax(1) == target).numpy()
    return {"accuracy": float(right.mean()), "accuracy beyond 6 hops": float(right[distance > 6].mean())}


def report(epoch: Epoch) -> None:
    print(f"epoch {epoch.number:2} loss {epoch.loss:.3f} validation {epoch.score:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    train, _ = broadcast.trees(arguments.graphs, 1)
    valid, _ = broadcast.trees(60, 2)
    nodes = np.mean([len(g.nodes) for g in train])
    print(f"{len(train)} training graphs of {nodes:.0f} nodes on average", flush=True)
    found = {}
    for name, more in (("graphmamba_micro", {}), ("message passing alone", {"global_model_type": "None"})):
        torch.manual_seed(arguments.seed)
        model = zoo.create("graphmamba_micro", **more)
        fit(model, train, valid, epochs=arguments.epochs, batch_size=16, rate=4e-3, warmup_epochs=2, report=report)
        found[name] = figures(model)
        print(name, found[name], flush=True)
        if not more and not arguments.dry_run:
            demo = PLUGIN / "demo"
            demo.mkdir(exist_ok=True)
            weights = {k: v.contiguous() for k, v in model.state_dict().items()}
            save_file(weights, demo / "graphmamba_micro.broadcast.safetensors")
            (demo / "colours.txt").write_text("\n".join(broadcast.COLOURS) + "\n", encoding="utf-8")
            broadcast.write_folder(demo / "sample", 3, 6, labels=False)  # three colours
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
