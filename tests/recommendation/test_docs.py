"""What docs/recommendation.md tells a user to type works: the recipe's table, the training, the Python block."""

import importlib.util
import re
import sys
from pathlib import Path

from click.testing import CliRunner

from zoo_recommendation.commands import recommend, train

ROOT = Path(__file__).parents[2]


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "plugins" / "recommendation" / "recipes" / "serials.py"
    spec = importlib.util.spec_from_file_location("serials", recipe)
    serials = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serials)
    monkeypatch.setattr(sys, "argv", ["serials.py", "interactions.csv", "--users", "100"])
    serials.main()
    small = ["--epochs", "1", "--core", "1", "--set", "hidden_size=16", "--set", "d_state=4", "--json"]
    assert CliRunner().invoke(train, ["mamba4rec", "interactions.csv", *small], catch_exceptions=False).exit_code == 0

    page = (ROOT / "docs" / "recommendation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    out = capsys.readouterr().out
    assert out.strip().endswith("False")  # not cold: ten items of a user with a history
    assert out.count("(") == 10
    answer = CliRunner().invoke(recommend, ["mamba4rec-interactions", "--user", "somebody new", "-k", "3"])
    assert "no history" not in answer.output
