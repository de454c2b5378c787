"""The Python of the documentation runs as it is printed."""

import re
from pathlib import Path

import pytest

import zoo_network

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "network.md", "README": ROOT / "plugins" / "network" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "plugins" / "network" / "src" / "zoo_network"
    place.mkdir(parents=True)
    (place / "demo").symlink_to(Path(zoo_network.__file__).parent / "demo")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert capsys.readouterr().out
    assert Path("flows.csv").read_text().count("\n") == len(names["answer"].flows) + 1
    if page == "docs":
        assert names["logits"].shape == (1, 4)
