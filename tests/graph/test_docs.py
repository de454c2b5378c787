"""The Python of the documentation runs as it is printed."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zoo_graph
from zoo.cli import run

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "graph.md", "README": ROOT / "plugins" / "graph" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "plugins" / "graph" / "src" / "zoo_graph"
    place.mkdir(parents=True)
    (place / "demo").symlink_to(Path(zoo_graph.__file__).parent / "demo")
    names: dict = {"graphs_of_yours": SimpleNamespace(x=torch.ones(2, 5), edge_index=torch.tensor([[0, 1], [1, 0]]))}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert capsys.readouterr().out
    assert Path("answers.csv").read_text().count("\n") == len(names["answer"].rows) + 1
    if page == "docs":
        assert names["out"].shape == (len(names["graphs"]), 3)


def test_the_commands_for_links_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw, folder = np.random.default_rng(0), tmp_path / "network"
    folder.mkdir()
    edges = "".join(f"n{a},n{a + k}\n" for a in range(30) for k in range(1, 4) if a + k < 30)
    (folder / "edges.csv").write_text("source,target\n" + edges)
    (folder / "nodes.csv").write_text("node,a\n" + "".join(f"n{i},{draw.normal():.3f}\n" for i in range(30)))
    (tmp_path / "pairs.csv").write_text("source,target\nn0,n1\nn0,n29\n")
    lines = re.findall(r"^zoo (.*links.*)$", PAGES["docs"].read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line for line in lines if "network/" in line]
    assert [line.split()[0] for line in lines] == ["train-graphs", "validate", "predict-graphs"]
    for line in lines:
        assert run(line.replace("--epochs 300", "--epochs 2").split()) == 0, capsys.readouterr().err
    assert Path("scores.csv").read_text().count("\n") == 3
