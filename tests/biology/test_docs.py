"""The Python of the documentation runs as it is printed, and its commands name what there is."""

import re
import shlex
from pathlib import Path

import pytest

import zoo_biology
from zoo.cli import run

ROOT = Path(__file__).parents[2]
EXAMPLES = Path(zoo_biology.__file__).parent / "examples"
PAGES = {"docs": ROOT / "docs" / "biology.md", "README": ROOT / "plugins" / "biology" / "README.md"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins" / "biology" / "src" / "zoo_biology").mkdir(parents=True)
    (tmp_path / "plugins" / "biology" / "src" / "zoo_biology" / "examples").symlink_to(EXAMPLES)
    for name, sample in (("genome.fa", "motifs.fa"), ("genome.fa.gz", "motifs.fa"), ("family.fa", "family.fa"),
                         ("family.a3m", "family.fa"), ("series.smi", "series.smi")):  # fmt: skip
        (tmp_path / name).write_text((EXAMPLES / sample).read_text())
    (tmp_path / "molecules.csv").write_text("smiles\nCCO\n")
    (tmp_path / "molecules.smi").write_text("CCO\nCCN\nCCCO\n")
    (tmp_path / "families").mkdir()
    for i in range(2):
        (tmp_path / "families" / f"{i}.fa").write_text((EXAMPLES / "family.fa").read_text())
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, files, capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    if page == "docs":
        assert (files / "embeddings.csv").is_file()
        assert (names["whole"] - names["steps"]).detach().abs().max() < 1e-4
    else:
        assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(page, files, capsys):
    lines = re.findall(r"^ *(zoo [a-z]+-[a-z]+ .*)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.partition("  #")[0])[1:]
        if "--checkpoint" in words:
            continue  # a file of the authors'
        if words[0] == "train-sequences":  # only smaller than printed
            words += ["--steps", "1", "--batch-size", "2"]
            words += ["--set", "d_model=16", "--set", "num_blocks=1"] if "--start" not in words else []
        assert run(words) == 0, f"{line}: {capsys.readouterr().err}"
