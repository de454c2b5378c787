"""``zoo train-language``: texts to windows, the loss, runs that go on, folders that work."""

import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import zoo
import zoo.testing
from zoo.cli import training
from zoo.runs import Run
from zoo.training import Settings, fit
from zoo_language import corpus
from zoo_language.commands_training import train_language
from zoo_language.corpus import documents, files_in, prepare
from zoo_language.mamba import MambaLM
from zoo_language.scoring import score
from zoo_language.tokenizer import ByteTokenizer, HubTokenizer
from zoo_language.training import Windows, check_causal, held_out_score, next_token_loss
from zoo_registry import errors

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "red", "foxes", "sleep"]
SMALL = ["--set", "d_model=32", "--set", "n_layer=2", "--set", 'ssm={"d_state": 8, "headdim": 16}']


def prose(seed: int, lines: int = 30) -> str:
    draw = np.random.default_rng(seed)
    return "".join(" ".join(draw.choice(WORDS, 6)) + ".\n" for _ in range(lines))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(prose(i))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([prose(9)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def model(**kind):
    torch.manual_seed(0)
    kind = {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 16}} | kind
    return MambaLM(32, 2, 256, **kind)


def run(*arguments):
    return CliRunner().invoke(train_language, [*map(str, arguments)])


# -- files ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")  # as Windows writes it
    (tmp_path / "deep" / "b.md").write_text("three")
    (tmp_path / "deep" / "er" / "c.JSONL").write_text('{"text": "four\\u2028still four", "id": 1}\n\n{"text": ""}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n{"text": "six"}'))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"seven"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\0")
    found = ["".join(pieces) for pieces in documents(files_in([tmp_path]))]
    assert sorted(found) == ["five", "four\u2028still four", "one\ntwo\n", "seven", "six", "three"]


@pytest.mark.parametrize("text", [prose(0), "x" * 500, "a\n\n  b\nc\n" * 60, "ä€\n" * 99])
def test_long_texts_are_read_in_pieces(tmp_path, monkeypatch, tokenizer, text):
    monkeypatch.setattr(corpus, "PIECE", 64)
    (tmp_path / "a.txt").write_text(text)
    pieces = list(next(documents([tmp_path / "a.txt"])))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 128
    if " " in text:  # cut where no token of a byte-level tokenizer lies across
        made = HubTokenizer(tokenizer / "tokenizer.json")
        assert [i for piece in pieces for i in made.encode(piece)] == made.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt is no text in UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', 'a.jsonl, line 2: it has no "text"'),
        ("a.jsonl", b"hello", "a.jsonl, line 1: Expecting value.*expected an object a line"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: half a character"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is no gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "is no gzip file, or was cut short"),
        ("a.pdf", b"x", "ends in '.pdf'; expected .txt, .md, .jsonl"),
        ("a.txt", b"", "there is no text in it"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "tokens", files_in([tmp_path / name]), ByteTokenizer())
    assert not (tmp_path / "tokens").exists()


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_texts_follow_one_another(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two é"}\n')
    found = prepare(tmp_path / "tokens", [tmp_path / "a.jsonl"], ByteTokenizer()).train
    assert bytes(found.tokens.astype(np.uint8)).decode() == "\none\ntwo é"
    assert found.begins.tolist() == [0, 4]
    assert found.sizes.tolist() == [3, 6]
    assert [(len(ids), size) for ids, size in found.texts()] == [(4, 3), (7, 6)]
    ids, begins = found.window(2, 5)
    assert bytes(ids.astype(np.uint8)) == b"ne\ntwo"
    assert begins.tolist() == [False, False, True, False, False]
    made = HubTokenizer(tokenizer / "tokenizer.json")
    again = prepare(tmp_path / "tokens", [tmp_path / "a.jsonl"], made).train  # another tokenizer: made anew
    end = made.end_of_text
    assert again.tokens.tolist() == [end, *made.encode("one"), end, *made.encode("two é")]


def test_held_out_texts_are_whole_and_within_the_share(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:03d}" * 9}) + "\n" for i in range(40)))
    one = prepare(tmp_path / "one", [tmp_path / "a.jsonl"], ByteTokenizer(), held_out=0.1, seed=3)
    other = prepare(tmp_path / "other", [tmp_path / "a.jsonl"], ByteTokenizer(), held_out=0.1, seed=4)
    again = prepare(tmp_path / "again", [tmp_path / "a.jsonl"], ByteTokenizer(), held_out=0.1, seed=3)
    assert len(one.held.begins) == 4
    assert len(one.train.begins) == 36
    assert np.array_equal(one.held.tokens, again.held.tokens)
    monkeypatch.setattr(corpus, "HELD_OUT_TEXTS", 3)
    few = prepare(tmp_path / "few", [tmp_path / "a.jsonl"], ByteTokenizer(), held_out=0.1, seed=3)
    assert len(few.held.begins) == 3
    assert not np.array_equal(one.held.tokens, other.held.tokens)


def test_the_end_of_a_single_text_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    text = prose(1)
    (tmp_path / "a.txt").write_text(text)
    found = prepare(tmp_path / "tokens", [tmp_path / "a.txt"], ByteTokenizer(), held_out=0.2)
    train, held = (bytes(s.tokens.astype(np.uint8)).decode()[1:] for s in (found.train, found.held))
    assert train + held == text
    assert train.endswith(".\n")
    assert found.held.sizes.tolist() == [len(held)]
    assert 0.2 <= len(held) / len(text) < 0.25


def test_tokens_are_made_once(tmp_path, texts):
    files = files_in([texts])
    prepare(tmp_path / "tokens", files, ByteTokenizer())
    before = (tmp_path / "tokens" / "train.tokens").stat().st_mtime_ns
    prepare(tmp_path / "tokens", files, ByteTokenizer())
    assert (tmp_path / "tokens" / "train.tokens").stat().st_mtime_ns == before
    files[0].write_text("something else")
    assert b"something else" in bytes(
        prepare(tmp_path / "tokens", files, ByteTokenizer()).train.tokens.astype(np.uint8)
    )


# -- windows and the loss ---------------------------------------------------------------------------------------------


def test_batches_are_windows_of_the_stream(tmp_path, texts):
    stream = prepare(tmp_path / "tokens", files_in([texts]), ByteTokenizer()).train
    windows = Windows(stream, 100, 4, seed=1)
    batch = windows(7)
    assert batch["ids"].shape == (4, 101)
    assert torch.equal(batch["ids"], windows(7)["ids"])
    everything = bytes(stream.tokens.astype(np.uint8))
    assert all(bytes(row.to(torch.uint8).tolist()) in everything for row in batch["ids"])
    with pytest.raises(errors.BadArgument, match="a window of 9999 needs 10000"):
        Windows(stream, 9999, 4)


def test_packed_texts_do_not_see_each_other():
    """The loss of two texts in one row is that of each alone, where the model takes resets."""
    torch.manual_seed(0)
    ids = torch.randint(256, (1, 21))
    begins = torch.zeros(1, 20, dtype=torch.bool)
    begins[0, [0, 8]] = True
    apart = model()
    alone = [{"ids": ids[:, :9], "begins": begins[:, :8]}, {"ids": ids[:, 8:], "begins": begins[:, 8:]}]
    expected = sum(next_token_loss(apart, part) * part["begins"].shape[1] for part in alone) / 20
    torch.testing.assert_close(next_token_loss(apart, {"ids": ids, "begins": begins}), expected)
    mixed = model(attention_layers=[1], attention={"num_heads": 2})
    plain = F.cross_entropy(mixed(ids[:, :-1]).flatten(0, 1), ids[0, 1:])
    torch.testing.assert_close(next_token_loss(mixed, {"ids": ids, "begins": begins}), plain)


def test_recomputed_logits_change_nothing():
    torch.manual_seed(0)
    batch = {"ids": torch.randint(256, (3, 17)), "begins": torch.zeros(3, 16, dtype=torch.bool)}
    one, other = model(), model()
    next_token_loss(one, batch).backward()
    next_token_loss(other, batch, recompute=True).backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        zoo.testing.assert_close(q.grad, p.grad, tolerance=1e-5, what=name)


@pytest.mark.parametrize("name", ["hydra_lm_29m", "mamba_hax", "dynamax_mamba2_130m"])
def test_what_a_model_adds_to_the_loss(name):
    """Experts, key scores and exits learn as well: their gradients are not those of the next token alone."""
    tiny = zoo.testing.case(name)
    torch.manual_seed(0)
    made = tiny.build().train()
    ids = torch.randint(40, (2, 13))
    torch.manual_seed(1)
    hidden, more = made.learn(ids[:, :-1])
    assert more.item() > 0
    torch.manual_seed(1)
    loss = next_token_loss(made, {"ids": ids, "begins": torch.zeros(2, 12, dtype=torch.bool)})
    logits = made.head(hidden)[..., : made.vocab_size]
    torch.testing.assert_close(loss, more + F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    loss.backward()
    part = {"hydra_lm_29m": "router", "mamba_hax": "dx_proj", "dynamax_mamba2_130m": "exits"}[name]
    assert all(p.grad.abs().sum() > 0 for n, p in made.named_parameters() if part in n and n.endswith("weight"))


def test_a_model_that_looks_ahead_is_refused(texts, tmp_path):
    found = run("mamba_lsh", texts, "--out", tmp_path / "out", "--tokenizer", "bytes", "--length", 64)
    assert found.exit_code != 0
    assert "mamba_lsh is not causal as it is built" in str(found.exception) + found.output
    made = zoo.create("mamba_lsh", vocab_size=256, causal=True)
    check_causal(made, 64, "mamba_lsh")
    assert made.training


def test_a_run_goes_on(tmp_path, texts):
    found = prepare(tmp_path / "tokens", files_in([texts]), ByteTokenizer(), held_out=0.1)

    def train(run, report):
        made = model()
        fit(
            made, Windows(found.train, 32, 2), next_token_loss, Settings(steps=5, rate=1e-2), run=run, report=report,
            score=lambda m: -held_out_score(m, found.held, window=64, carry=True).bits_per_byte, score_every=2,
        )  # fmt: skip
        return made

    zoo.testing.check_resume(train, tmp_path, after=3)


# -- the command ------------------------------------------------------------------------------------------------------


def test_it_learns_and_says_what_zoo_validate_says(texts, tmp_path, monkeypatch):
    others = tmp_path / "others"
    others.mkdir()
    for i in range(2):
        (others / f"{i}.txt").write_text(prose(20 + i, 9))
    out = tmp_path / "out"
    command = ["mamba2_micro", texts, "--out", out, "--steps", 60, "--length", 48, "--batch-size", 4, "--rate", 1e-2]
    found = run(*command, *SMALL, "--validation", others, "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["metrics"]["bits_per_byte"] < 2.5  # 8 by chance, 4.0 by how often each letter comes
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    measured = zoo.validate(out, others)
    assert measured.metrics == pytest.approx(said["metrics"], rel=1e-6)
    assert measured.samples == said["measured"]
    assert set(zoo.pipeline(out, max_new_tokens=60)("seven red ").text.split()) & set(WORDS)
    monkeypatch.chdir(texts)
    again = run("mamba2_micro", ".", *command[2:], "--start", out, "--held-out", 0.3)
    assert again.exit_code == 0, again.output
    assert "apart" in again.output
    assert f'zoo generate {out} "Once"' in again.output


def test_an_interrupted_command_goes_on(texts, tmp_path, monkeypatch):
    """With the tokens that are there, to the weights that an uninterrupted one ends with; nothing else is left."""
    command = ["mamba2_micro", texts, "--steps", 5, "--length", 16, "--batch-size", 2, "--score-every", 2, *SMALL]
    assert run(*command, "--out", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(Run.__init__, "__kwdefaults__", {"every": 0.0, "on_resume": None})
    reporter, calls = training.reporter, []

    def interrupting(*given, **how):
        def report(step, loss):
            calls.append(step)
            if len(calls) == 4:
                raise KeyboardInterrupt
            reporter(*given, **how)(step, loss)

        return report

    monkeypatch.setattr(training, "reporter", interrupting)
    out = tmp_path / "out"
    stopped = run(*command, "--out", out)
    assert f"{out} holds the run up to step 3: the same command goes on there" in stopped.output
    monkeypatch.setattr(corpus, "_write", None)  # nothing is tokenised again
    again = run(*command, "--out", out)
    assert again.exit_code == 0, again.output
    assert "going on after step 3 of an interrupted run" in again.output
    assert calls == [0, 1, 2, 3, 3, 4]
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    ours, whole = zoo.load(out).state_dict(), zoo.load(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in ours.items())


def test_a_tokenizer_goes_with_the_weights(texts, tmp_path, tokenizer):
    out = tmp_path / "out"
    found = run(
        "birdie_gated_ssm", texts, "--out", out, "--tokenizer", tokenizer, "--steps", 2, "--length", 16, "--set",
        "d_model=16", "--set", "d_state=24", "--set", "n_layer=2", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    made = HubTokenizer(tokenizer / "tokenizer.json")
    loaded = zoo.load(out)
    assert loaded.vocab_size == made.size == 300
    moved = zoo.save(loaded, tmp_path / "moved")
    pipe = zoo.pipeline(moved, max_new_tokens=3)
    assert pipe.tokenizer.encode(prose(3)) == made.encode(prose(3))
    assert pipe.tokenizer.end_of_text == made.end_of_text
    assert pipe("the quick").tokens == 3
    assert len((moved / "README.md").read_text()) < 6000  # the tokenizer is not spread out there
    again = run(
        "mamba2_micro", texts, "--out", tmp_path / "e", "--tokenizer", tokenizer, "--end-of-text", "e", "--steps", 1,
        "--length", 16, *SMALL,
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert zoo.pipeline(tmp_path / "e").tokenizer.end_of_text == made.encode("e")[0]
    text = prose(4)
    whole = score(loaded, [made.end_of_text, *made.encode(text)], text_bytes=len(text))
    (tmp_path / "t.txt").write_text(text)
    assert zoo.validate(out, tmp_path / "t.txt").metrics["bits_per_byte"] == pytest.approx(whole.bits_per_byte)


def test_models_that_read_their_text_again_are_measured_by_windows(texts, tmp_path):
    out = tmp_path / "out"
    found = run(
        "icll_dfa_transformer", texts, "--out", out, "--tokenizer", "bytes", "--steps", 2, "--length", 40, "--set",
        "max_positions=40", "--set", "d_model=16", "--validation", texts / "0.txt",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "(as zoo validate -o carry=false -o window=40)" in found.output
    measured = zoo.validate(out, texts / "0.txt", carry=False, window=40)
    assert f"bits_per_byte {measured.metrics['bits_per_byte']:.4f}" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mamba2_micro", "--held-out", 0.1, "--validation", "."], "give one, a share of the data or other data"),
        (["birdie_hawk"], "birdie_hawk names no tokenizer; give --tokenizer"),
        (["vim_tiny"], "vim_tiny is for image-classification"),
        (["mamba2_micro", "--tokenizer", "nothing.json"], "there is no file 'nothing.json'"),
        (["mamba2_micro", "--end-of-text", "x"], "give it with --tokenizer"),
        (["mamba2_micro", "--tokenizer", "TOKENIZER", "--end-of-text", "</s>"], "has no token '</s>'"),
        (["mamba2_micro", "--length", 100_000], "a window of 100000 needs 100001"),
        (["mamba2_micro", "--tokenizer", "bytes", "--set", "vocab_size=200"], "the tokenizer has 256 tokens and"),
    ],
)
def test_what_is_refused(texts, tmp_path, tokenizer, arguments, message):
    (tmp_path / "more.txt").write_text("x")
    arguments = [{".": tmp_path, "TOKENIZER": tokenizer}.get(a, a) for a in arguments]
    found = run(*arguments, texts, "--out", tmp_path / "out", "--steps", 1)
    assert found.exit_code != 0
    assert message in " ".join((found.output + str(found.exception)).split())
