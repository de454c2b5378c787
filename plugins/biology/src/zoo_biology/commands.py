"""``zoo embed-dna``, ``score-dna``, ``score-protein``, ``generate-protein``, ``generate-molecules``,
``score-molecules``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from zoo.cli import output

OUT = [click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer to this file.")]
SAMPLING = [
    click.option("--temperature", default=1.0, show_default=True, help="0: always the likeliest."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k likeliest (0: all)."),
    click.option("--top-p", default=1.0, show_default=True, help="Keep those that reach this probability together."),
    click.option("--seed", default=0, show_default=True),
]
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def options(*groups: list[Any]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return lambda command: add(output.loading_options(output.as_json(command)))


def answer(model: str, task: str, given: Any, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Run a pipeline on one input; print its answer, and write it where that was asked for."""
    import zoo

    from .outputs import check_output

    if out is not None:
        check_output(out, task)
    arguments = output.loading(chosen)
    pipe = zoo.pipeline(model, task, **arguments, **{k: v for k, v in chosen.items() if v is not None})
    result = pipe(given)
    if out is not None:
        result.save(out)
    if as_json:
        output.emit(result.to_dict() | ({"file": str(out)} if out is not None else {}))
    else:
        click.echo(result.summary() + (f" -> {out}" if out is not None else ""))


@click.command("embed-dna")
@click.argument("model")
@click.argument("fasta", type=FILE)
@click.option("--window", type=int, help="Bases read at a time (default: those of the weights, or 1024).")
@click.option("--margin", default=0, show_default=True, help="More on either side, read but not averaged.")
@click.option("--pool", type=click.Choice(["record", "window", "base"]), default="record", show_default=True)
@click.option("--both-strands", is_flag=True, help="Mean with the reverse complement's embedding.")
@options(OUT)
def embed_dna(model: str, fasta: Path, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Embeddings of the records of FASTA (plain or gzipped) under MODEL; --out NAME.csv, .parquet or .safetensors."""
    answer(model, "dna-embedding", fasta, out, as_json, **chosen)


@click.command("score-dna")
@click.argument("model")
@click.argument("fasta", type=FILE)
@click.option("--window", type=int, help="Bases read at a time (default: those of the weights, or 1024).")
@options(OUT)
def score_dna(model: str, fasta: Path, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """How likely the records of FASTA are under MODEL: -ln p a base."""
    answer(model, "dna-likelihood", fasta, out, as_json, **chosen)


@click.command("score-protein")
@click.argument("model")
@click.argument("homologs", type=FILE)
@click.option("--target", default="-1", show_default=True, help="Name or number of the record to score.")
@click.option("--mutations", default="", help="'all', or a list like A10G,L3P.")
@click.option("--candidates", type=FILE, help="Score each protein of this FASTA file after all HOMOLOGS instead.")
@click.option("--context-tokens", default=131072, show_default=True, help="Residues of homologs read at most.")
@options(OUT)
def score_protein(model: str, homologs: Path, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Score one protein of HOMOLOGS (FASTA or A3M) after the others, and its mutations."""
    answer(model, "protein-scoring", homologs, out, as_json, **chosen)


@click.command("generate-protein")
@click.argument("model")
@click.argument("homologs", type=FILE)
@click.option("--count", default=8, show_default=True)
@click.option("--max-length", default=1000, show_default=True, help="Residues at most.")
@click.option("--fill", help="Fill these parts of the target anew instead: 10-20,31-35.")
@click.option("--target", default="-1", show_default=True, help="Name or number of the record to fill.")
@click.option("--context-tokens", default=131072, show_default=True, help="Residues of homologs read at most.")
@options(SAMPLING, OUT)
def generate_protein(model: str, homologs: Path, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Draw proteins after HOMOLOGS (FASTA or A3M); --out NAME.fa, .csv or .parquet."""
    answer(model, "protein-generation", homologs, out, as_json, **chosen)


@click.command("generate-molecules")
@click.argument("model")
@click.argument("context", type=FILE, required=False)
@click.option("--count", default=16, show_default=True)
@click.option("--max-length", default=200, show_default=True, help="Segments at most.")
@click.option("--vocabulary", type=FILE, help="The init_arguments.json beside an original's model.pt.")
@options(SAMPLING, OUT)
def generate_molecules(model: str, context: Path | None, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Draw molecules, alone or after those of the file CONTEXT (a SMILES a line); --out NAME.smi, .csv or .parquet."""
    answer(model, "molecule-generation", context, out, as_json, **chosen)


@click.command("score-molecules")
@click.argument("model")
@click.argument("molecules", type=FILE)
@click.option("--context", type=FILE, help="Molecules that stand before each of them.")
@click.option("--vocabulary", type=FILE, help="The init_arguments.json beside an original's model.pt.")
@options(OUT)
def score_molecules(model: str, molecules: Path, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """How likely the MOLECULES of a file are under MODEL: -ln p a segment."""
    answer(model, "molecule-scoring", molecules, out, as_json, **chosen)
