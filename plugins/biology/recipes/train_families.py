"""Trains and measures prot_xlstm_micro.families: a model of generated protein families, homologs in context.

python plugins/biology/recipes/train_families.py [--steps 1200] [--only-score]
"""

from __future__ import annotations

import argparse

import families
import numpy as np
import torch
import torch.nn.functional as F
from fitting import DEMO, fit, write
from safetensors.torch import load_file
from torch import Tensor

import zoo
from zoo_biology.homologs import Context, context, draw_spans, protein, single_site
from zoo_biology.tokens import Protein

FILE, LENGTH = "prot_xlstm_micro.families.safetensors", 224


def sample(generator: np.random.Generator) -> Context:
    """LENGTH tokens: members of one family one after the other, patches cut out of each."""
    whole = Context()
    for number, residues in enumerate(families.Family(generator).members(12, generator)):
        whole += protein(residues, number, draw_spans(len(residues), generator))
        if len(whole) > LENGTH:
            break
    return Context(whole.ids[: LENGTH + 1], whole.positions[: LENGTH + 1], whole.sequences[: LENGTH + 1])


def train(model: torch.nn.Module, steps: int, batch: int) -> None:
    generator = np.random.default_rng(1)

    def loss_of(step: int) -> Tensor:
        rows = [sample(generator) for _ in range(batch)]
        ids = torch.tensor([row.ids for row in rows])
        positions = torch.tensor([row.positions for row in rows])
        logits = model(ids[:, :-1], position_ids=positions[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(model, loss_of, steps, lr=6e-3, every=100)


@torch.no_grad()
def measure(model: torch.nn.Module) -> None:
    generator = np.random.default_rng(99)
    losses: dict[int, list[float]] = {}
    for _ in range(100):
        whole = context(families.Family(generator).members(8, generator)).tensors()
        logits = model(whole["ids"], position_ids=whole["position_ids"])[0, :-1]
        ids, number = whole["ids"][0, 1:], whole["sequence_ids"][0, 1:]
        residue = ids >= Protein.FIRST
        cost = F.cross_entropy(logits, ids, reduction="none")
        for n in range(8):
            losses.setdefault(n, []).append(float(cost[residue & (number == n)].mean()))
    for n in (0, 1, 3, 7):
        print(f"{n} homologs in context: perplexity {np.exp(np.mean(losses[n])):.3f} a residue")
    kept, broken = [], []
    for _ in range(60):
        family = families.Family(generator)
        members = family.members(8, generator)
        wild = Protein().decode(members[-1])
        state = model.init_state(1)
        before = context(members[:-1]).tensors()
        model(before["ids"], position_ids=before["position_ids"], state=state)
        for place in range(len(wild)):
            target = single_site(members[-1], place).tensors()
            logits = model(target["ids"], position_ids=target["position_ids"], state=state.fork())[0, -1]
            scores = logits[Protein.FIRST : Protein.LAST].log_softmax(0)
            for residue in Protein.RESIDUES:
                if residue == wild[place]:
                    continue
                kinds = families.KIND[[Protein.RESIDUES.index(residue), Protein.RESIDUES.index(wild[place])]]
                allowed = not family.fixed[place] and kinds[0] == kinds[1]
                change = scores[Protein.RESIDUES.index(residue)] - scores[Protein.RESIDUES.index(wild[place])]
                (kept if allowed else broken).append(float(change))
    print(f"single mutations, allowed against others in the family: AUC {auc(kept, broken):.4f}")


def auc(high: list[float], low: list[float]) -> float:
    """The chance that one of ``high`` is above one of ``low``."""
    values = np.array(high + low)
    ranks = values.argsort().argsort() + 1
    return float((ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only-score", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = zoo.create("prot_xlstm_micro")
    if options.only_score:
        state = load_file(DEMO / FILE)
        model.load_state_dict({k: v.float() for k, v in state.items()})
        model.eval()
    else:
        train(model, options.steps, options.batch)
        write(model, FILE)
    measure(model)


if __name__ == "__main__":
    main()
