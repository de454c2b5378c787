"""The Python of the documentation of Mixture-of-Mamba and Broad Mamba runs as it is printed."""

import re
from pathlib import Path

import pytest

import zoo_multimodal

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "multimodal.md", "README": ROOT / "plugins" / "multimodal" / "README.md"}


def snippets(page):
    """Of the sections that begin with these systems' names."""
    sections = re.split(r"(?m)^## ", PAGES[page].read_text(encoding="utf-8"))
    own = [s for s in sections if s.startswith(("Mixture-of-Mamba", "Broad Mamba"))]
    assert len(own) == 2
    return [code for s in own for code in re.findall(r"```python\n(.*?)```", s, re.DOTALL)]


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "plugins" / "multimodal" / "src" / "zoo_multimodal"
    place.mkdir(parents=True)
    (place / "demo").symlink_to(Path(zoo_multimodal.__file__).parent / "demo")
    names: dict = {}
    for code in snippets(page):
        exec(code, names)
    assert Path("drawn.png").exists()
    if page == "docs":
        assert capsys.readouterr().out
        assert names["y"].shape == (2, 50, 64)
        assert Path("answers.csv").read_text().count("\n") == len(names["answer"].rows) + 1


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    from zoo_multimodal.plugin import zoo_commands

    text = PAGES[page].read_text(encoding="utf-8")
    for verb in ("train-interleaved", "predict-emotions", "train-emotions"):
        assert f"zoo {verb} " in text
        assert verb in zoo_commands()
