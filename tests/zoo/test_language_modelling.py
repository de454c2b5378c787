"""Texts to perplexity and next words by a word-level language model."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo import errors
from zoo.cli import run
from zoo.tasks.words import Vocabulary

PAGE = Path(__file__).parents[2] / "docs" / "sequences.md"
#: 39 words and <eos>, of known frequencies: word i of the list appears 39 - i times, the last two equally often
WORDS = ["the", ",", "<unk>", "."] + [f"w{i}" for i in range(4, 39)]
TEXT = "the w5 , zebra w6\n\nthe w30 .\n" * 3


@pytest.fixture
def training_text(tmp_path):
    """As WikiText's files look: blanks around every word and at the ends of lines, empty lines."""
    counts = [39 - i for i in range(38)] + [2]
    pieces = [word for word, count in zip(WORDS, counts, strict=True) for _ in range(count)]
    lines = [" " + " ".join(pieces[i : i + 7]) + " \n" for i in range(0, len(pieces), 7)]
    (tmp_path / "wiki.train.tokens").write_text(" \n".join(lines))
    return tmp_path / "wiki.train.tokens"


@pytest.fixture(scope="module")
def model():
    model = zoo.testing.case("s4_wt103").build(layer=LAYER).eval()
    with torch.no_grad():
        for p in model.loss.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


LAYER = [{"type": "s4", "mode": "dplr", "l_max": 12, "n_ssm": 1, "d_state": 8, "final_act": "glu"}, {"type": "ffn"}]


def test_the_vocabulary_is_the_originals(training_text, tmp_path):
    """<eos>, then by frequency; equal ones in the order of their first appearance (collections.Counter's)."""
    vocabulary = Vocabulary.read(training_text, 40)
    assert vocabulary.words == ["<eos>", *WORDS]
    assert vocabulary.save(tmp_path / "v.txt").read_text().split() == ["<eos>", *WORDS]
    assert Vocabulary.read(tmp_path / "v.txt", 40).words == vocabulary.words
    ids, missing = vocabulary.encode("the zebra\n\nw4")
    assert ids == [1, 3, 0, 0, 5]
    assert missing == ["zebra"]


@torch.no_grad()
def test_perplexity_and_next_words(model, training_text, tmp_path):
    pipe = zoo.pipeline(model, vocabulary=training_text, top_k=3)
    (tmp_path / "a.txt").write_text("the w5 , zebra w6\n")
    ids = torch.tensor([1, 6, 2, 3, 7, 0])
    log = model(ids[None])[0]
    nats = -log[:-1].gather(1, ids[1:, None]).sum().item()
    answer = pipe(tmp_path / "a.txt")
    assert answer.perplexity == pytest.approx(math.exp(nats / 5), rel=1e-5)
    assert (answer.words, answer.unknown) == (5, 1)
    best = log[-1].topk(3)
    assert answer.next_words == [pipe.vocabulary.words[i] for i in best.indices.tolist()]
    assert answer.next_probabilities == pytest.approx(best.values.exp().tolist(), abs=1e-6)
    assert "over 5 words (1 unknown)" in answer.summary()
    assert pipe("the w5 , zebra w6\n").nats == pytest.approx(answer.nats)
    assert zoo.pipeline(model)(ids).nats == pytest.approx(answer.nats)
    alone = pipe("the")
    assert alone.perplexity is None
    assert alone.summary().startswith("next: ")
    assert "perplexity" not in alone.to_dict()


@torch.no_grad()
def test_windows_carry_the_state(model, training_text):
    """A long text by windows is the recurrence over all of it; without the state every window starts anew."""
    ids = torch.tensor(Vocabulary.read(training_text, 40).encode(TEXT)[0])
    state, rows = model.init_state(1), []
    for token in ids:
        rows.append(model.step(token[None], state)[0])
    log = torch.stack(rows)
    nats = -log[:-1].gather(1, ids[1:, None]).sum().item()
    assert len(ids) > 24
    for window in (12, 5, 7):
        found = zoo.pipeline(model, vocabulary=training_text, window=window)(TEXT)
        assert found.nats == pytest.approx(nats, rel=1e-4)
        assert found.next_probabilities[0] == pytest.approx(log[-1].exp().max().item(), rel=1e-3)
    anew = zoo.pipeline(model, vocabulary=training_text, carry_state=False)(TEXT)
    parts = [model(ids[None, i : i + 12])[0] for i in range(0, len(ids), 12)]
    assert anew.nats == pytest.approx(-torch.cat(parts)[:-1].gather(1, ids[1:, None]).sum().item(), rel=1e-5)


def test_batches(model, training_text):
    pipe = zoo.pipeline(model, vocabulary=training_text)
    texts = ["the w5 .", "w7 w8 w9", "the"]
    assert [a.nats for a in pipe(texts, batch_size=3)] == pytest.approx([pipe(t).nats for t in texts], rel=1e-5)


def test_mistakes(model, training_text, tmp_path):
    with pytest.raises(errors.BadArgument, match=r"give vocabulary=, a file with its 40 words, .* wiki\.train\.tokens"):
        zoo.pipeline(model)("the")
    with pytest.raises(errors.LocalFileMissing, match="no vocabulary"):
        zoo.pipeline(model, vocabulary=tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("the\nw4\nw4\n")
    with pytest.raises(errors.BadArgument, match=r"knows 40 words\. Read as one word a line the file has 3, .* 3$"):
        zoo.pipeline(model, vocabulary=tmp_path / "short.txt")
    (tmp_path / "twice.txt").write_text("\n".join(["same", *["same"], *WORDS[:38]]))
    with pytest.raises(errors.BadArgument, match="'same' more than once"):
        zoo.pipeline(model, vocabulary=tmp_path / "twice.txt")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(errors.BadArgument, match="no text in UTF-8"):
        zoo.pipeline(model, vocabulary=tmp_path / "bytes.bin")
    plain = Vocabulary([f"v{i}" for i in range(40)])
    with pytest.raises(ValueError, match="no word 'the' and no <unk>"):
        zoo.pipeline(model, vocabulary=plain)("v1 the")
    assert plain.encode("v1\nv2") == ([1, 2], [])
    with pytest.raises(errors.BadArgument, match=r"39 words; .* knows 40"):
        zoo.pipeline(model, vocabulary=Vocabulary(WORDS))
    pipe = zoo.pipeline(model, vocabulary=training_text)
    with pytest.raises(ValueError, match="holds no word"):
        pipe("  ")
    with pytest.raises(errors.BadArgument, match="word ids from 0 to 40"):
        pipe(np.array([0, 40]))
    with pytest.raises(errors.BadArgument, match="expected a text, a Path, or word ids"):
        pipe(np.array([0.5]))
    with pytest.raises(errors.BadArgument, match="window is 13; expected 1 or more words, at most the layers' 12"):
        zoo.pipeline(model, window=13)
    with pytest.raises(errors.BadArgument, match="no word-level language model"):
        zoo.pipeline(torch.nn.Linear(1, 1), task="language-modelling")


def test_the_command_line(model, training_text, tmp_path, capsys):
    zoo.save(model, tmp_path / "mine")
    (tmp_path / "a.txt").write_text(TEXT)
    words = ["predict", str(tmp_path / "mine"), str(tmp_path / "a.txt"), "--json", "-o", f"vocabulary={training_text}"]
    assert run(words) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["perplexity"] > 1
    assert len(answer["next_words"]) == 5
    assert run([*words[:3], *words[4:4]]) == 2
    assert "give vocabulary=" in capsys.readouterr().err


def test_the_documentation_names_what_there_is():
    """The page's command for the published model gives options that the pipeline has."""
    text = PAGE.read_text(encoding="utf-8")
    assert "zoo predict s4_wt103" in text
    assert set(re.findall(r"-o (\w+)=", text)) <= {"vocabulary", "top_k", "window", "carry_state"}
