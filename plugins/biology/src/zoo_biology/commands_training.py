"""``zoo train-sequences``."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training

_FILES = click.Path(exists=True, path_type=Path)
#: Of AdamW, as the originals train.
BETAS = (0.9, 0.95)
#: Of the samples, held out.
SHARE = 0.05
#: Letters at a time, where neither the weights nor the user say so.
LENGTHS = {"DNA": 1024, "molecules": 100, "proteins": 2048}
#: What is done with the trained model.
NEXT = {"DNA": "score-dna {} MORE.fa", "molecules": "generate-molecules {}", "proteins": "score-protein {} HOMOLOGS.fa"}


@click.command("train-sequences")
@click.argument("name")
@click.argument("files", nargs=-1, required=True, type=_FILES)
@training.out
@click.option("--length", type=click.IntRange(min=2), help="Letters at a time (default: those of the weights).")
@click.option("--vocabulary", type=_FILES, help="SMILES: the init_arguments.json beside an original's model.pt.")
@click.option("--series", is_flag=True, help="SMILES: lines hold molecules joined by '.', whose order is drawn anew.")
@training.planned(
    steps=2000,
    rate=2e-3,
    weight_decay=0.1,
    batch_size=16,
    of="Windows, molecules or families.",
    share=SHARE,
    validation="path",
    example="d_model=64",
)
def train_sequences(
    name: str,
    files: tuple[Path, ...],
    length: int | None,
    vocabulary: Path | None,
    series: bool,
    plan: training.Plan,
) -> None:
    """Train NAME on FILES or folders of them: DNA (FASTA, FASTQ), molecules (SMILES a line, or CSV), or proteins (FASTA
    or A3M, each file a family of homologs).

    Objectives are the authors': masked or next base, next segment, next residue after homologs with parts cut out. Some
    samples are held out and measured in perplexity a letter; the weights of the best measure are kept. A run that was
    interrupted goes on when the same command is given again.

    \b
        zoo train-sequences dna_xlstm_1k_ps genomes/ --out mine --length 1024 --device cuda
        zoo train-sequences chem_xlstm_1_6m drugs.smi --out mine
        zoo train-sequences prot_xlstm_micro families/ --out mine --start prot_xlstm_micro.families --rate 3e-4
    """
    import zoo
    from zoo.building import trained
    from zoo.training import fit

    from . import training_files as read
    from .dna import DNAXLSTM
    from .protein import ProtXLSTM
    from .tokens import Vocabulary
    from .training import batches, loss
    from .xlstm import XLSTMLM

    others = [] if plan.validation is None else [plan.validation]
    arguments = plan.arguments
    model = training.begun(name, plan.start, plan.seed, **arguments)
    weights = model.zoo_info.weights
    said = {} if weights is None else dict(weights.preprocess)
    kind = "DNA" if isinstance(model, DNAXLSTM) else "proteins" if isinstance(model, ProtXLSTM) else "molecules"
    if kind != "molecules" and (series or vocabulary is not None):
        raise click.UsageError(f"--series and --vocabulary are for molecules; {name} reads {kind}")
    length = length or said.get("window", said.get("context", LENGTHS[kind]))
    if kind == "DNA":
        data: Any = read.read_bases(model, files, others, plan.share, length, plan.seed)  # type: ignore[arg-type]
    elif kind == "proteins":
        data = read.read_families(model, files, others, plan.share, length, plan.seed)  # type: ignore[arg-type]
    elif isinstance(model, XLSTMLM):
        words = None if vocabulary is None else Vocabulary.read(vocabulary)
        if plan.start is not None and words is None:
            from .molecules import MoleculeScoring

            words = MoleculeScoring(model).vocabulary
        data = read.read_molecules(words, files, others, plan.share, length, plan.seed, series=series)
        if plan.start is None:  # as many labels as there are
            model = training.begun(name, None, plan.seed, **{"vocab_size": len(data.vocabulary)} | arguments)
    else:
        raise click.UsageError(f"{name} is a {type(model).__name__}, which is no Bio-xLSTM")
    settings = dataclasses.replace(plan.settings, betas=BETAS)
    with (
        training.processes(plan.device) as place,
        plan.run(samples=len(data), measured=len(data.held)) as run,
    ):
        if not plan.as_json:
            click.echo(f"{kind}: {len(data)} samples to train on, {len(data.held)} to measure on")
        fitted = fit(
            model.to(place.device), batches(data, plan.batch_size, plan.seed), loss, settings, run=run,
            report=plan.report(),
            score=(lambda m: -data.nats(m)[0]) if data.held else None,
            score_every=plan.score_every,
        )  # fmt: skip
        nats, letters = data.nats(model) if data.held else (math.nan, 0)
        found = {"perplexity": math.exp(nats), "nats": nats} if letters else {}
        if place.first:
            source = files[0] if plan.validation is None else plan.validation
            split = "held out" if plan.validation is None else "validation"
            metrics = training.measured(found, dataset=source.name, split=split, command="train-sequences")
            trained(model, ", ".join(file.name for file in files), read.settings_of(data))
            zoo.save(model.cpu(), plan.out, metrics=metrics)
    if plan.as_json:
        counts = {"samples": len(data), "measured": len(data.held), "letters": letters, "taken_at": fitted.taken_at}
        output.emit(counts | {"metrics": found, "folder": str(plan.out)})
        return
    if found:
        click.echo(f"{letters} letters that were not trained on: {training.said(found)}")
    click.echo(f"saved to {plan.out}; try: zoo {NEXT[kind].format(training.source(plan.out))}")
