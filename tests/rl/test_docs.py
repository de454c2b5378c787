"""The Python of the documentation runs as it is printed."""

import re
from pathlib import Path

import pytest

import zoo_rl

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "rl.md", "README": ROOT / "plugins" / "rl" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins" / "rl" / "src").mkdir(parents=True)
    (tmp_path / "plugins" / "rl" / "src" / "zoo_rl").symlink_to(Path(zoo_rl.__file__).parent)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    if page == "docs":
        assert names["answer"].agreement == 1
        assert isinstance(names["action"], int)
        assert -1 < names["rows"][-1]["return"] < 1
    else:
        assert names["action"].shape == (2,)
