"""What the pages say of training runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["quickstart.md", "plugins.md"])
def test_checkpointing_and_autocast_run(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (snippet,) = (s for s in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "set_grad_checkpointing()" in s)
    names: dict = {}
    exec("import zoo\n" + snippet, names)
    model = names["model"]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert sum(getattr(m, "grad_checkpointing", False) for m in model.modules()) > 1
