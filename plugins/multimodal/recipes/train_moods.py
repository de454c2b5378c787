"""Train the Broad Mamba demo on generated dialogues (see moods.py), and beside it what sees single utterances.

    uv run python plugins/multimodal/recipes/train_moods.py

writes the checkpoint and a sample file into the plugin, and prints the figures of the card: weighted F1 on dialogues of
another seed, of the model, of the same model trained and measured on single utterances, with a broad head before and
after solving it by ridge regression, and of exact inference, which knows how the dialogues were made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import moods
import numpy as np
import torch
from safetensors.torch import save_file

import zoo
from zoo_multimodal.emotion_training import Epoch, Settings, alone, fit, measure, scores, solve_head

DEMO = Path(__file__).parents[1] / "src" / "zoo_multimodal" / "demo"
NAME = "broad_mamba_micro"


def figures(model: torch.nn.Module, context: bool = True) -> dict[str, float]:
    test = moods.dialogues(300, 3)
    found = measure(model, test if context else alone(test))
    return {"weighted F1": found.weighted_f1, "accuracy": found.accuracy}


def exact() -> dict[str, float]:
    test = moods.dialogues(300, 3)
    predicted = torch.from_numpy(np.concatenate([moods.exact(d) for d in test]))
    true = torch.tensor([moods.MOODS.index(label) for d in test for label in d.labels or []])
    found = scores(predicted, true, len(moods.MOODS))
    return {"weighted F1": found.weighted_f1, "accuracy": found.accuracy}


def report(epoch: Epoch) -> None:
    print(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation F1 {epoch.weighted_f1:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="train this form alone")
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    train, valid = moods.dialogues(arguments.dialogues, 1), moods.dialogues(150, 2)
    found: dict[str, dict[str, float]] = {"exact inference": exact()}
    print(found, flush=True)
    forms: dict[str, dict] = {NAME: {}, "single utterances": {}, "broad head": {"head": "broad"}}
    for name, more in forms.items():
        if arguments.only not in (None, name):
            continue
        print(name, flush=True)
        torch.manual_seed(arguments.seed)
        model = zoo.create(NAME, **more)
        context = name != "single utterances"
        settings = Settings(arguments.epochs, 32 if context else 480, arguments.rate, seed=arguments.seed)
        fit(model, train if context else alone(train), valid if context else alone(valid), settings, report)
        model.to(torch.float16).to(torch.float32)  # measure what is shipped
        found[name] = figures(model, context)
        if more:
            solve_head(model, train, penalty=1.0)
            found["broad head, solved by ridge regression"] = figures(model)
        print(json.dumps(found), flush=True)
        if name == NAME and not arguments.dry_run:
            DEMO.mkdir(exist_ok=True)
            state = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
            save_file(state, DEMO / f"{NAME}.moods.safetensors")
            moods.write(DEMO / "moods.npz", 3, 11, digits=2)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
