"""What the documents say is true: README snippets run, docs/language.md names every model and where its weights lie."""

import re
from pathlib import Path

import pytest

from zoo_registry import load_cards

ROOT = Path(__file__).parents[2]


def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    text = (ROOT / "plugins/language/README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 4
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    assert len(names["three"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("card", load_cards("zoo_language"), ids=lambda card: card.name)
def test_every_model_is_listed(card):
    page = (ROOT / "docs/language.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(f"| `{card.name}` |")]
    assert len(rows) == max(len(card.weights), 1)
    for tag, weights in card.weights.items():
        row = next(line for line in rows if f"| {tag} |" in line)
        assert weights.repo_id is None or weights.repo_id in row
        assert weights.licence is None or weights.licence in row
