"""Train the demo of mmMamba: questions about generated pictures of coloured shapes.

    uv run python plugins/multimodal/recipes/train_scenes.py

trains the same network by the same recipe twice, once with the pictures and once, for fewer steps, with every picture
grey, measures both on questions that neither saw, writes the checkpoint and a sample picture into the plugin, and
prints the figures that belong on the card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo_multimodal import scenes
from zoo_multimodal.chat_template import IMAGE, TEMPLATES, with_pictures
from zoo_multimodal.tiles import normalised
from zoo_multimodal.tokenizer import WordTokenizer

DEMO = Path(__file__).parents[1] / "src" / "zoo_multimodal" / "demo"
UNSEEN = 1_000_000  # the seed of the test questions
TOKENIZER = WordTokenizer(scenes.WORDS)
STOP = TOKENIZER.id_of("<|im_end|>")


def encoded(found: list[list[scenes.Sample]], tokens: int) -> tuple[Tensor, Tensor]:
    """Ids (conversations, longest) with the answers, and which positions foretell a token of an answer."""
    rows, masks = [], []
    for questions in found:
        row, mask = TOKENIZER.encode(with_pictures(IMAGE, [1], tokens)), []
        for s in questions:
            row += TOKENIZER.encode(TEMPLATES["plain"].text(s.question))
            mask += [False] * (len(row) - 1 - len(mask))
            answer = [*TOKENIZER.encode(s.answer), STOP]
            row, mask = row + answer, mask + [True] * len(answer)
        rows.append(row)
        masks.append(mask)
    longest = max(map(len, rows))
    ids = torch.tensor([r + [STOP] * (longest - len(r)) for r in rows])
    mask = torch.tensor([m + [False] * (longest - 1 - len(m)) for m in masks])
    return ids, mask


def pictures(found: list[list[scenes.Sample]]) -> Tensor:
    return torch.stack([normalised(questions[0].scene.picture()) for questions in found])


def train(name: str, *, blind: bool, steps: int, batch: int, rate: float, seed: int, turns: int) -> torch.nn.Module:
    """AdamW with a warm-up of 100 steps, a cosine that would end far behind, and a straight line to 0 in the last
    sixth; the loss is the cross entropy of the answers' tokens."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = zoo.create(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02)

    horizon, bend = steps / 0.6, steps * 5 // 6

    def cosine(step: int) -> float:
        return min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / horizon)) + 0.01)

    def schedule(step: int) -> float:
        return cosine(step) if step < bend else cosine(bend) * (steps - step) / (steps - bend)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began, total, right = time.perf_counter(), 0.0, 0.0
    for step in range(1, steps + 1):
        found = [scenes.conversation(rng, turns) for _ in range(batch)]
        ids, mask = encoded(found, model.tokens_per_tile)
        pixels = pictures(found)
        logits = model(ids[:, :-1], torch.zeros_like(pixels) if blind else pixels)[mask]
        target = ids[:, 1:][mask]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total, right = total + loss.item(), right + (logits.argmax(-1) == target).float().mean().item()
        if step % 200 == 0:
            spent = time.perf_counter() - began
            print(f"step {step}: loss {total / 200:.3f}, tokens right {right / 200:.3f}, {spent:.0f} s", flush=True)
            total = right = 0.0
    return model.eval()


@torch.no_grad()
def measured(model: torch.nn.Module, found: list[scenes.Sample], *, blind: bool = False) -> dict[str, float]:
    """The share of answers that are right to the last word, one question a picture: each token foretold from the right
    ones before it, which for a whole answer is the same as writing it greedily."""
    right: dict[str, list[float]] = {about: [] for about in scenes.QUESTIONS}
    for start in range(0, len(found), 256):
        part = found[start : start + 256]
        ids, mask = encoded([[s] for s in part], model.tokens_per_tile)
        pixels = pictures([[s] for s in part])
        logits = model(ids[:, :-1], torch.zeros_like(pixels) if blind else pixels)
        good = ((logits.argmax(-1) == ids[:, 1:]) | ~mask).all(1)
        for s, one in zip(part, good.tolist(), strict=True):
            right[s.about].append(float(one))
    every = [v for values in right.values() for v in values]
    return {"all": sum(every) / len(every)} | {k: sum(v) / len(v) for k, v in right.items()}


def commonest(found: list[scenes.Sample]) -> float:
    """The accuracy of always giving the commonest answer of each kind of question."""
    counts: dict[str, Counter[str]] = {}
    for s in found:
        counts.setdefault(s.about, Counter())[s.answer] += 1
    return sum(c.most_common(1)[0][1] for c in counts.values()) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mmmamba_micro")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument(
        "--baseline-steps", type=int, default=900, help="of the training without pictures: it learns no more"
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--turns", type=int, default=4, help="questions a picture")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=4000, help="held-out questions")
    parser.add_argument("--part", choices=["both", "model", "baseline"], default="both", help="which trainings")
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    parser.add_argument("--only-score", action="store_true", help="measure the demo that is there, train nothing")
    arguments = parser.parse_args()
    held = scenes.samples(arguments.questions, UNSEEN)
    if arguments.only_score:
        print(json.dumps(measured(zoo.load(arguments.model).float(), held), indent=1))
        return
    how = {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "seed", "turns")}
    results = {}
    if arguments.part in ("both", "model"):
        model = train(arguments.model, blind=False, **how)
        model.to(torch.float16).to(torch.float32)  # so the checkpoint holds it; measure what is shipped
        results["mmmamba"] = measured(model, held)
        if not arguments.dry_run:
            DEMO.mkdir(exist_ok=True)
            state = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
            save_file(state, DEMO / "mmmamba_micro.scenes.safetensors", metadata={"format": "pt"})
            scenes.sample(random.Random(UNSEEN + 3), "place").scene.picture().save(DEMO / "scene.png")
    if arguments.part in ("both", "baseline"):
        blind = train(arguments.model, blind=True, **{**how, "steps": arguments.baseline_steps})
        results["without pictures"] = measured(blind, held, blind=True)
    results["commonest answers"] = {"all": commonest(held)}
    print(json.dumps({k: {n: round(v, 4) for n, v in r.items()} for k, r in results.items()}, indent=1))


if __name__ == "__main__":
    main()
