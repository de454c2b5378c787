"""What docs/time_series.md tells a user to type works: the recipe's table, the commands, the Python blocks."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import zoo.cli
import zoo.testing

ROOT = Path(__file__).parents[2]


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "time_series.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("series", ROOT / "plugins" / "time_series" / "recipes" / "series.py")
    series = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(series)
    lines = [
        line.partition("  #")[0]
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    for line in lines:
        first, *words = shlex.split(line)
        if first == "python":
            monkeypatch.setattr(sys, "argv", ["series.py", *words[1:]])
            series.main()
            continue
        assert first == "zoo"
        if words[0] == "train-forecaster":
            words += ["--epochs", "1", "--steps", "3"]  # the last of a repeated option counts
        assert zoo.cli.run(words) == 0, f"{line}: {capsys.readouterr().err}"
    assert (tmp_path / "demand_forecast.png").exists()
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, space)
    assert "(1, 96, 1)" in capsys.readouterr().out
    assert (tmp_path / "next.csv").read_text().count("\n") == 25


def test_every_model_is_on_the_page():
    """Names, with data sets' names and families in braces written out or meant."""
    page = (ROOT / "docs" / "time_series.md").read_text(encoding="utf-8")
    for name in zoo.testing.model_names(plugin="time_series"):
        family = re.sub(r"_\d+$", "", name)
        assert f"`{name}" in page or f"`{family}_{{" in page or f"`{family}_*" in page, f"{name} is not described"
