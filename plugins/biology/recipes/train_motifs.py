"""Trains and measures dna_xlstm_micro.motifs: a reverse-complement equivariant masked model of generated DNA.

python plugins/biology/recipes/train_motifs.py [--steps 900] [--only-score]
"""

from __future__ import annotations

import argparse

import motifs
import torch
import torch.nn.functional as F
from fitting import DEMO, fit, write
from safetensors.torch import load_file
from torch import Tensor

import zoo
from zoo_biology.tokens import DNA

FILE = "dna_xlstm_micro.motifs.safetensors"


def masked(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """15 % of the places are asked for: of those 80 % show the mask, 10 % another base, 10 % themselves."""
    asked = torch.rand(ids.shape, generator=generator) < 0.15
    kind = torch.rand(ids.shape, generator=generator)
    shown = torch.where(asked & (kind < 0.8), DNA.MASK, ids)
    random = 7 + torch.randint(0, 4, ids.shape, generator=generator)
    return torch.where(asked & (kind >= 0.8) & (kind < 0.9), random, shown), asked


def train(model: torch.nn.Module, steps: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def loss_of(step: int) -> Tensor:
        bases, _ = motifs.draw(batch, generator)
        ids = bases + 7
        shown, asked = masked(ids, generator)
        return F.cross_entropy(model(shown)[asked], ids[asked])

    fit(model, loss_of, steps, lr=8e-3)


@torch.no_grad()
def measure(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(99)
    bases, which = motifs.draw(256, generator)
    ids = bases + 7
    asked = torch.rand(ids.shape, generator=generator) < 0.15
    logits = model(torch.where(asked, DNA.MASK, ids))
    right = logits[..., 7:11].argmax(-1) == bases
    bits = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") / torch.log(torch.tensor(2.0))
    for name, where in (("in motifs", asked & (which >= 0)), ("in the background", asked & (which < 0))):
        print(f"masked bases {name}: accuracy {right[where].float().mean():.4f}, {bits[where].mean():.4f} bits")
    complement = model.complement
    whole = model(complement[ids.flip(1)]).flip(1)[..., complement]
    print(f"reverse complement: largest difference {(model(ids) - whole).abs().max():.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only-score", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = zoo.create("dna_xlstm_micro")
    if options.only_score:
        state = load_file(DEMO / FILE)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        model.eval()
    else:
        train(model, options.steps, options.batch)
        write(model, FILE)
    measure(model)


if __name__ == "__main__":
    main()
