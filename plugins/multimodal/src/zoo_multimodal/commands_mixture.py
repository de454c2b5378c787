"""The verb of Mixture-of-Mamba on the command line: ``zoo train-interleaved``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training
from zoo_registry import errors


@click.command()
@click.argument("name")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@training.out
@training.steps(1000)
@training.batch_size(32, "Documents.")
@training.rate(1e-3)
@click.option("--warmup", default=50, show_default=True, type=click.IntRange(min=0), help="Steps.")
@training.run_options("dense=true")
@training.resume
@output.as_json
def train_interleaved(
    name: str,
    data: Path,
    out: Path,
    steps: int,
    batch_size: int,
    rate: float,
    warmup: int,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train the model NAME on the documents in DATA: 90 % of them, the others measure.

    DATA is a .jsonl file, one document a line: {"segments": [{"text": ...}, {"image": "file.png"}, {"tokens": [...],
    "modality": 1}]}. A model with a codebook learns its codes from the training pictures first. A Transfusion model
    takes an .npz file with input_ids (documents, length), latents (documents, length, numbers) and optionally lengths.

    \b
        zoo train-interleaved mixture_of_mamba_micro documents.jsonl --out trained
    """
    import torch

    import zoo

    from .mixture_lm import MixtureLM
    from .mixture_training import Settings
    from .transfusion import TransfusionMamba

    torch.manual_seed(seed)
    model = zoo.create(name, **output.pairs(choices, "--set"))
    if not isinstance(model, (MixtureLM, TransfusionMamba)):
        raise click.UsageError(f"{name} is a {type(model).__name__}; expected a model of mixture_of_mamba_...")
    settings = Settings(steps, batch_size, rate, warmup=warmup, seed=seed)

    def report(step: int, loss: float) -> None:
        if not as_json and step % 100 == 0:
            click.echo(f"step {step:5} loss {loss:.4f}")

    train = _transfusion if isinstance(model, TransfusionMamba) else _discrete
    with training.run(out, resume, quiet=as_json, bytes=data.stat().st_size) as run:
        try:
            found, count = train(model, data, settings, device, report, run)
        except errors.ZooError:  # with a status of its own
            raise
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        rows = training.measured(found, dataset=data.name, split=f"{count} documents", command="train-interleaved")
        zoo.save(model.cpu(), out, metrics=rows)
    if as_json:
        output.emit(found | {"documents": count, "folder": str(out)})
        return
    click.echo(f"{count} documents kept for measuring: {training.said(found)}")
    click.echo(f"saved to {out}")


def _kept(count: int) -> int:
    """How many documents measure."""
    if count < 2:
        raise ValueError(f"there are {count} documents; at least 2 are needed, one of them to measure")
    return max(1, count // 10)


def _discrete(
    model: Any, data: Path, settings: Any, device: str, report: Any, run: Any
) -> tuple[dict[str, float], int]:
    from .documents import Codec, fit_codebook, load_picture, read_documents
    from .mixture_training import bits, fit

    documents = read_documents(data)
    kept = _kept(len(documents))
    if model.patch:
        size = model.grid * model.patch
        paths = [d.folder / s["image"] for d in documents[:-kept] for s in d.segments if "image" in s]
        if paths:
            pictures = [load_picture(p, size) for p in paths]
            model.codebook.copy_(fit_codebook(pictures, len(model.codebook), model.patch))
    codec = Codec(model)
    rows = [codec.encode(d, end=bool(codec.alphabet))[0] for d in documents]
    fit(model.to(device), rows[:-kept], settings, report, run)
    names = ("text", "image", "speech")
    found = bits(model, rows[-kept:])
    each = {f"bits a token of {names[m] if m < 3 else f'modality {m}'}": v for m, v in enumerate(found)}
    return {k: v for k, v in each.items() if v is not None}, kept


def _transfusion(
    model: Any, data: Path, settings: Any, device: str, report: Any, run: Any
) -> tuple[dict[str, float], int]:
    import torch

    from zoo.files import read_arrays

    from .mixture_training import fit_transfusion

    if data.suffix.lower() != ".npz":
        raise ValueError(f"{data.name} is no .npz file; a Transfusion model takes one with input_ids and latents")
    file = read_arrays(data)
    if missing := {"input_ids", "latents"} - set(file):
        raise ValueError(f"{data.name} has no {sorted(missing)[0]}; it holds {', '.join(file)}")
    for key, array in file.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{data.name}: {key} is an array of {array.dtype}; expected numbers")
    ids = torch.from_numpy(file["input_ids"]).long()
    latents = torch.from_numpy(file["latents"]).float()
    lengths = torch.from_numpy(file["lengths"]).long() if "lengths" in file else None
    if ids.dim() != 2 or latents.shape != (*ids.shape, model.latent_dim):
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}, latents {tuple(latents.shape)}; expected (documents, length) and "
            f"(documents, length, {model.latent_dim})"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) <= model.patch_id:
        raise ValueError(f"input_ids go from {int(ids.min())} to {int(ids.max())}; expected 0 to {model.patch_id}")
    lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
    kept = _kept(len(ids))
    fit_transfusion(model.to(device), ids[:-kept], latents[:-kept], lengths[:-kept], settings, report, run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own = (t[-kept:].to(device) for t in (ids, latents, lengths))
        found = model.losses(*own, generator=generator)
    return {"nats a token of text": float(found["text"]), "noise error of images": float(found["image"])}, kept
