"""Train the Mixture-of-Mamba demo on generated documents (see picture_documents.py), and the dense baseline beside it.

    uv run python plugins/multimodal/recipes/train_mixture.py

writes the checkpoint and a sample document into the plugin, and prints the figures of the card: bits a token of text
and of pictures, and how many pictures are drawn, and captions written, without a fault, all on pictures of another
seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import picture_documents as shapes
import torch
from PIL import Image
from safetensors.torch import save_file

import zoo
from zoo_multimodal.documents import Codec, fit_codebook, load_picture, make_document
from zoo_multimodal.interleaved import Interleaved
from zoo_multimodal.mixture_training import Settings, bits, fit

DEMO = Path(__file__).parents[1] / "src" / "zoo_multimodal" / "demo"
NAME = "mixture_of_mamba_micro"


def rows(model: torch.nn.Module, documents: list[list[dict]]) -> list[list[int]]:
    codec = Codec(model)
    return [codec.encode(make_document(d), end=True)[0] for d in documents]


def figures(model: torch.nn.Module, count: int = 200) -> dict[str, float]:
    """On documents and pictures of a seed of their own, the same ones each time."""
    text, image = bits(model, rows(model, shapes.documents(count, 3)))
    pipe, codec = Interleaved(model), Codec(model)
    drawn = written = 0
    for own in shapes.pictures(count, 4):
        words, picture = {"text": shapes.caption(own)}, {"image": shapes.draw(own)}
        said = pipe([make_document([words]), make_document([picture])])
        drawn += [c + codec.starts[1] for c in said[0].codes] == codec.picture(shapes.draw(own), "")[1:]
        written += said[1].text == shapes.caption(own)
    return {
        "bits a token of text": text,
        "bits a token of pictures": image,
        "pictures drawn": drawn / count,
        "captions written": written / count,
    }


def report(step: int, loss: float) -> None:
    if step % 100 == 0:
        print(f"step {step:5} loss {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="train this form alone")
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    pictures = [load_picture(shapes.draw(own), 16) for own in shapes.pictures(1000, 1)]
    found: dict[str, Any] = {}
    for name, more in ((NAME, {}), ("dense", {"dense": True})):
        if arguments.only not in (None, name):
            continue
        torch.manual_seed(arguments.seed)
        model = zoo.create(NAME, **more)
        model.codebook.copy_(fit_codebook(pictures, len(model.codebook), model.patch))
        train = rows(model, shapes.documents(arguments.documents, 1))
        settings = Settings(arguments.steps, 16, arguments.rate, warmup=100, seed=arguments.seed)
        print(name, flush=True)
        fit(model, train, settings, report)
        model.to(torch.float16).to(torch.float32)  # measure what is shipped
        found[name] = figures(model) | {"parameters": sum(p.numel() for p in model.parameters())}
        print(name, found[name], flush=True)
        if not more and not arguments.dry_run:
            write(model)
    print(json.dumps(found, indent=1))


def write(model: torch.nn.Module) -> None:
    """The checkpoint, and a document of two new pictures, the second without a caption."""
    (DEMO / "shapes").mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, DEMO / f"{NAME}.shapes.safetensors")
    segments = shapes.document(shapes.pictures(2, 11), caption_first=False)[:-1]
    own: list[dict] = []
    for i, segment in enumerate(segments):
        if "image" in segment:
            Image.fromarray(segment["image"]).save(DEMO / "shapes" / f"{i}.png", optimize=True)
            segment = {"image": f"{i}.png"}
        own.append(segment)
    lines = ",\n  ".join(json.dumps(segment) for segment in own)
    (DEMO / "shapes" / "document.json").write_text(f'{{"segments": [\n  {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
