"""The hooks of the biology plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zoo_registry import ModelCard, hookimpl, load_cards

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_models() -> Iterable[ModelCard]:
    return load_cards("zoo_biology")


@hookimpl
def zoo_adapters() -> Mapping[str, str]:
    return {"bio_xlstm": "zoo_biology.bio_xlstm:Adapter"}


@hookimpl
def zoo_pipelines() -> Mapping[str, str]:
    return {
        "dna-embedding": "zoo_biology.genomes:DNAEmbedding",
        "dna-likelihood": "zoo_biology.genomes:DNALikelihood",
        "protein-scoring": "zoo_biology.proteins:ProteinScoring",
        "protein-generation": "zoo_biology.proteins:ProteinGeneration",
        "molecule-generation": "zoo_biology.molecules:MoleculeGeneration",
        "molecule-scoring": "zoo_biology.molecules:MoleculeScoring",
    }


@hookimpl
def zoo_demos() -> Iterable[Mapping[str, str]]:
    return [
        {"model": "dna_xlstm_micro.motifs", "file": "examples/motifs.fa"},
        {"model": "prot_xlstm_micro.families", "file": "examples/family.fa"},
        {"model": "chem_xlstm_micro.series", "file": "examples/series.smi"},
    ]


@hookimpl
def zoo_commands() -> Mapping[str, str]:
    return {
        "embed-dna": "zoo_biology.commands:embed_dna",
        "score-dna": "zoo_biology.commands:score_dna",
        "score-protein": "zoo_biology.commands:score_protein",
        "generate-protein": "zoo_biology.commands:generate_protein",
        "generate-molecules": "zoo_biology.commands:generate_molecules",
        "score-molecules": "zoo_biology.commands:score_molecules",
        "train-sequences": "zoo_biology.commands_training:train_sequences",
    }
