"""The Python of the documentation runs as it is printed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo_graph

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
