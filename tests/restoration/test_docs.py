"""The Python of the documentation runs as it is printed, and its commands are there."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import zoo_restoration
from zoo.cli import zoo as command_line
from zoo_restoration.degradations import KINDS, Degradation

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "restoration.md", "README": ROOT / "plugins" / "restoration" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins" / "restoration" / "src").mkdir(parents=True)
    (tmp_path / "plugins" / "restoration" / "src" / "zoo_restoration").symlink_to(Path(zoo_restoration.__file__).parent)
    names = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for code in snippets:
        exec(code, names)
    assert (tmp_path / "large.png").exists()
    assert names["answer"].scale == 2


def test_the_degradations_of_the_page():
    rows = re.findall(rf"`((?:{'|'.join(KINDS)}):[^`]*)`", PAGES["docs"].read_text(encoding="utf-8"))
    assert {Degradation.parse(row).kind for row in rows} == set(KINDS)


@pytest.mark.parametrize("command", ["restore", "upscale", "train-restorer"])
def test_the_commands_say_what_they_do(command):
    result = CliRunner().invoke(command_line, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "--out" in result.output
    assert command in PAGES["docs"].read_text(encoding="utf-8")
