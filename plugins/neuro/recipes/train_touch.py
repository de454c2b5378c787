"""Train the demo of touch on generated whisking (see whisking.py) and measure it on solids it never touched.

    python plugins/neuro/recipes/train_touch.py

writes the checkpoint, its category names and a sample recording into the plugin, and prints the figures of the card:
those of the network on solids of other sizes and proportions, and beside them those of two baselines on the same
recordings (logistic regression on every whisker's mean and extremes, and the nearest training recording).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import whisking
from safetensors.torch import save_file

import zoo
from zoo_neuro.tactile.model import TactileNetwork
from zoo_neuro.tactile.recordings import Layout, Recordings
from zoo_neuro.tactile.training import Settings, accuracy, train

DEMO = Path(__file__).parents[1] / "src" / "zoo_neuro" / "demo"
CLASSES = list(whisking.CLASSES)
TEST = (60, 2, 3)  # solids of each kind, sweeps over each, seed


def recordings(objects: int, sweeps: int, seed: int) -> Recordings:
    x, labels = whisking.data(objects, sweeps, seed)
    return Recordings(Layout(11, (60, 5, 7)).frames(x), torch.from_numpy(labels), CLASSES)


def mirrored(x: torch.Tensor) -> torch.Tensor:
    """A batch with every other sweep upside down, which the array and its laws do not notice: rows change places, the
    force along z its sign, and the torques about x and y theirs. (batch, time, 60, 5, 7)"""
    signs = torch.tensor([1.0, 1, -1, -1, -1, 1]).repeat(10)[:, None, None]
    return torch.where(torch.rand(len(x), 1, 1, 1, 1) < 0.5, x, x.flip(3) * signs)


def summaries(frames: torch.Tensor) -> torch.Tensor:
    """Mean, least and largest value of every whisker's forces and torques: (n, 35 * 6 * 3)."""
    x = frames.unflatten(2, (-1, 6)).flatten(1, 2)
    return torch.cat([f(x).flatten(1) for f in (lambda v: v.mean(1), lambda v: v.amin(1), lambda v: v.amax(1))], 1)


def logistic(known: Recordings, test: Recordings) -> float:
    """Accuracy of multinomial logistic regression on the summaries, standardised, with the best of four decays."""
    x, y = summaries(known.frames), summaries(test.frames)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / std, (y - mean) / std
    found = []
    for decay in (1e-4, 1e-3, 1e-2, 1e-1):
        layer = torch.nn.Linear(x.shape[1], len(CLASSES))
        optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(layer=layer, optimiser=optimiser, decay=decay):
            optimiser.zero_grad()
            loss = F.cross_entropy(layer(x), known.labels) + decay * layer.weight.square().sum() / 2
            loss.backward()
            return loss

        optimiser.step(closure)
        found.append(float((layer(y).argmax(1) == test.labels).float().mean()))
    return max(found)


def nearest(known: Recordings, test: Recordings) -> float:
    distance = torch.cdist(test.frames.flatten(1), known.frames.flatten(1))
    return float((known.labels[distance.argmin(1)] == test.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=400, help="solids of each kind, for training")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    given = parser.parse_args()

    known, valid, test = recordings(given.objects, given.sweeps, 1), recordings(30, 2, 2), recordings(*TEST)
    print(f"{len(known)} training sweeps, {len(valid)} validation, {len(test)} test", flush=True)
    model = zoo.create("tactile_micro")
    assert isinstance(model, TactileNetwork)
    seen = [Recordings(model.scaled(r.frames), r.labels, CLASSES) for r in (known, test)]  # as the network reads them
    rules = {"logistic regression": logistic(*seen), "nearest recording": nearest(*seen)}
    print(json.dumps(rules), flush=True)
    torch.manual_seed(given.seed)
    model = zoo.create("tactile_micro")
    settings = Settings(
        epochs=given.epochs, batch_size=64, rate=4e-3, weight_decay=0.05, optimiser="adamw", schedule="cosine",
        seed=given.seed,
    )  # fmt: skip
    train(
        model, known, valid, settings, view=mirrored,
        report=lambda e: print(f"epoch {e.number:2} loss {e.loss:.3f} validation {e.accuracy:.4f}", flush=True),
    )  # fmt: skip
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in weights.items()})  # what is stored is what is measured
    print(json.dumps({"test": accuracy(model, test), "baselines": rules}, indent=1))
    if given.dry_run:
        return
    DEMO.mkdir(exist_ok=True)
    save_file(weights, DEMO / "tactile_micro.solids.safetensors")
    (DEMO / "solids.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    x, labels = whisking.data(1, 1, 5)
    i = CLASSES.index("ring")
    np.savez_compressed(DEMO / "whisker_sweep.npz", data=x[i].round(4), label=labels[i])


if __name__ == "__main__":
    main()
