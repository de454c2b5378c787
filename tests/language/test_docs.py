"""What the documents say is true: README snippets run, docs/language.md names every model and where its weights lie."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from zoo.cli import run
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


def test_commands_of_training_run(tmp_path, monkeypatch, capsys):
    """As printed, but for the one that fetches a checkpoint: only texts, models and steps are smaller."""
    tokenizers = pytest.importorskip("tokenizers")
    page = (ROOT / "docs/language.md").read_text()
    section = re.findall(r"^## Train on your own data\n(.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)[0]
    lines = re.findall(r"^    zoo (.*)$", section, flags=re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["train-language", "generate", "validate"] + ["train-language"] * 2
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for i in range(3):
        Path(f"notes/{i}.txt").write_text("In the beginning were the notes. " * 9)
    Path("corpus.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "Once upon a time. " * 20}).encode()))
    tokenizers.ByteLevelBPETokenizer({chr(i): i for i in range(300)}, []).save("tokenizer.json")
    for line in lines[:-1]:
        words = shlex.split(line.replace("n_layer=4", "n_layer=1").replace("d_model=256", "d_model=16"))
        if words[0] == "train-language":
            words += ["--steps", "2", "--batch-size", "2", "--length", "16"]
        assert run(words) == 0, capsys.readouterr().err
    assert 'saved to new; try: zoo generate ./new "Once"' in capsys.readouterr().out
