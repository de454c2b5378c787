"""The Python about mmMamba in the documentation runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "multimodal.md", "README": ROOT / "plugins" / "multimodal" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    found = re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)
    for code in (c for c in found if "mmmamba" in c):
        exec(code, names)
    if page == "docs":
        assert names["answer"].text in "1234"
        assert names["more"]
        assert "".join(names["pieces"]) in ("yes", "no")
        assert callable(names["adapter"].arguments)
        assert [names["wsd"](s, *names["STAGES"][1].steps) for s in (0, 1000, 10_000)] == [0, 0.5, 1]
    else:
        assert names["logits"].shape == torch.Size([1, 39])
        assert names["state"].position == 1001
