"""Trains and measures chem_xlstm_micro.series: a SMILES model that continues series of generated molecules.

python plugins/biology/recipes/train_molecules.py [--steps 2500] [--only-score]
"""

from __future__ import annotations

import argparse
import random

import molecules
import torch
import torch.nn.functional as F
from fitting import DEMO, fit, write
from safetensors.torch import load_file
from torch import Tensor

import zoo
from zoo_biology.tokens import Vocabulary

FILE, TOKENS, LENGTH = "chem_xlstm_micro.series.safetensors", "chem_xlstm_micro.series.txt", 128


def vocabulary() -> Vocabulary:
    rng = random.Random(0)
    return Vocabulary.learn(molecules.text(rng) for _ in range(2000))


def encoded(vocabulary: Vocabulary, texts: list[str]) -> Tensor:
    """(texts, LENGTH + 1) labels: cut at the front and padded at the end, as the original's."""
    rows = [[vocabulary.begin, *vocabulary.encode(t), vocabulary.end] for t in texts]
    return torch.tensor([(row + [0] * (LENGTH + 1 - len(row)))[-(LENGTH + 1) :] for row in rows])


def train(model: torch.nn.Module, vocabulary: Vocabulary, steps: int, batch: int) -> None:
    rng = random.Random(1)

    def loss_of(step: int) -> Tensor:
        ids = encoded(vocabulary, [molecules.text(rng) for _ in range(batch)])
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)

    fit(model, loss_of, steps, lr=6e-3, every=100)


def measure(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    from zoo_biology.molecules import MoleculeGeneration, valid

    rng = random.Random(99)
    ids = encoded(vocabulary, [molecules.text(rng) for _ in range(256)])
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    print(f"held out: {loss:.4f} nats a segment")
    pipe = MoleculeGeneration(model, vocabulary=vocabulary, count=500, seed=3)
    alone = pipe(None).molecules
    print(f"500 molecules without context: {sum(map(valid, alone)) / 500:.3f} valid, {len(set(alone))} different")
    for shots in (1, 4):
        same = within = right = total = 0
        for trial in range(50):
            series = molecules.Series.draw(rng)
            context = [series.molecule(rng) for _ in range(shots)]
            found = MoleculeGeneration(model, vocabulary=vocabulary, count=10, seed=trial)(context).molecules
            total += len(found)
            right += sum(map(valid, found))
            same += sum(molecules.ring_of(m) == series.ring for m in found)
            within += sum(m not in context for m in found)
        print(
            f"{shots} molecules of a series in context: {right / total:.3f} valid, {same / total:.3f} have its ring "
            f"(by chance {1 / len(molecules.RINGS):.3f}), {within / total:.3f} are not in the context"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only-score", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = zoo.create("chem_xlstm_micro")
    words = vocabulary()
    assert len(words) == model.vocab_size, f"{len(words)} tokens, the card says {model.vocab_size}"
    if options.only_score:
        state = load_file(DEMO / FILE)
        model.load_state_dict({k: v.float() for k, v in state.items()})
        model.eval()
    else:
        train(model, words, options.steps, options.batch)
        write(model, FILE)
        (DEMO / TOKENS).write_text("\n".join(words.tokens) + "\n", encoding="utf-8")
    measure(model, words)


if __name__ == "__main__":
    main()
