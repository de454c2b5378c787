"""The demo checkpoints do what their cards say: the recipes' own measures, on smaller samples."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zoo
import zoo_biology
from zoo_biology.homologs import context
from zoo_biology.molecules import well_formed

EXAMPLES = Path(zoo_biology.__file__).parent / "examples"
RECIPES = Path(__file__).parents[2] / "plugins" / "biology" / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    names = ("motifs", "families", "molecules")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


def test_motifs_are_known_on_both_strands(recipe):
    motifs = recipe("motifs")
    model = zoo.load("dna_xlstm_micro.motifs")
    generator = torch.Generator().manual_seed(5)
    bases, which = motifs.draw(24, generator)
    asked = torch.rand(bases.shape, generator=generator) < 0.15
    with torch.no_grad():
        logits = model(torch.where(asked, 3, bases + 7))
        complement = model.complement
        back = model(complement[torch.where(asked, 3, bases + 7).flip(1)]).flip(1)[..., complement]
    assert torch.equal(back, logits)
    right = logits[..., 7:11].argmax(-1) == bases
    assert right[asked & (which >= 0)].float().mean() > 0.75
    assert right[asked & (which < 0)].float().mean() < 0.4  # the background cannot be guessed


def test_homologs_help(recipe):
    families = recipe("families")
    model = zoo.load("prot_xlstm_micro.families")
    generator = np.random.default_rng(5)
    first, last = [], []
    for _ in range(12):
        whole = context(families.Family(generator).members(8, generator)).tensors()
        with torch.no_grad():
            logits = model(whole["ids"], position_ids=whole["position_ids"])[0, :-1]
        ids, number = whole["ids"][0, 1:], whole["sequence_ids"][0, 1:]
        cost = F.cross_entropy(logits, ids, reduction="none")
        first.append(float(cost[(ids >= 4) & (number == 0)].mean()))
        last.append(float(cost[(ids >= 4) & (number == 7)].mean()))
    assert np.mean(first) > 2.7  # nothing is known of the first protein: ln 20 is 3.0
    assert np.mean(last) < 0.6 * np.mean(first)


def test_a_series_is_continued(recipe):
    molecules = recipe("molecules")
    import random

    rng = random.Random(5)
    same = formed = 0
    for trial in range(12):
        series = molecules.Series.draw(rng)
        given = [series.molecule(rng) for _ in range(4)]
        found = zoo.pipeline("chem_xlstm_micro", count=5, seed=trial)(given).molecules
        same += sum(molecules.ring_of(m) == series.ring for m in found)
        formed += sum(map(well_formed, found))
    assert formed >= 54  # of 60
    assert same >= 42


def test_samples_are_answered():
    """What `zoo demo` runs."""
    assert zoo.pipeline("dna_xlstm_micro")(EXAMPLES / "motifs.fa").vectors.shape == (6, 32)
    assert "7 homologs" in zoo.pipeline("prot_xlstm_micro")(EXAMPLES / "family.fa").summary()
    assert len(zoo.pipeline("chem_xlstm_micro")(EXAMPLES / "series.smi").molecules) == 16


def test_the_package_is_small():
    package = Path(zoo_biology.__file__).parent
    files = [p for folder in ("demo", "examples") for p in (package / folder).iterdir()]
    assert sum(p.stat().st_size for p in files) <= 250_000
