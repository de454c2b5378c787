"""Texts in, texts out, off the path: prompts, batches, stop strings over tokens, states, options, files."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo_language import commands
from zoo_language.generation import Sampling, Text, choose, generate
from zoo_language.incremental import MARK, Ends, Growing
from zoo_language.mamba import MambaLM
from zoo_language.pipelines import TextGeneration
from zoo_language.scoring import score
from zoo_language.state import State
from zoo_language.tokenizer import ByteTokenizer, HubTokenizer
from zoo_registry import WeightsCard, store

PROMPTS = ["And God said unto Moses, ", "x", "In the beginning"]


class Pairs:
    """Two letters a token: stop strings begin and end inside of tokens."""

    end_of_text = None

    def encode(self, text):
        return [(ord(a) - 97) * 7 + ord(b) - 97 for a, b in zip(text[::2], text[1::2], strict=False)]

    def decode(self, ids):
        return "".join("abcdefg"[i // 7] + "abcdefg"[i % 7] for i in ids)


def small():
    torch.manual_seed(0)
    model = MambaLM(32, 2, 49, "Mamba2", {"d_state": 8, "headdim": 8}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def demo():
    return zoo.load("mamba2_micro")


def test_the_tokenizer_lies_beside_carried_weights(tmp_path, monkeypatch):
    """A folder that was carried to a machine without a network: its tokenizer is a companion, not on the Hub."""
    words = {f"{c}": i for i, c in enumerate("abcdefgh ")}
    table = {"version": "1.0", "model": {"type": "BPE", "vocab": words, "merges": []}, "decoder": {"type": "Fuse"}}
    model = zoo.create("mamba2_130m", d_model=32, n_layer=2, vocab_size=49)
    card = WeightsCard(tag="x", where="here", preprocess={"tokenizer": "org/words"}, companions={"org/words": ("w",)})
    model.zoo_info.weights = card
    folder = zoo.save(model, tmp_path / "carried")
    asked = []
    monkeypatch.setattr(store, "hub_file", lambda *args, **kind: asked.append((args, kind)) or tmp_path / "t.json")
    place = store.companion_in(folder, "org/words", "tokenizer.json")
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(table))
    pipe = zoo.pipeline(str(folder), max_new_tokens=3, local_files_only=True)
    assert pipe.tokenizer.encode("bad") == [1, 0, 3]
    assert pipe.info.weights.companions == {"org/words": ("w",)}
    assert not asked
    place.rename(tmp_path / "t.json")
    assert zoo.pipeline(str(folder), local_files_only=True, cache_dir=tmp_path).tokenizer.encode("a") == [0]
    assert asked == [
        (("org/words", "tokenizer.json"), {"revision": None, "cache_dir": tmp_path, "local_files_only": True})
    ]


# -- batches, seeds, states -------------------------------------------------------------------------------------------


def test_prompts_of_unequal_lengths_are_one_batch(demo, monkeypatch):
    pipe = zoo.pipeline(demo, max_new_tokens=6)
    together = []
    continue_from = pipe.continue_from
    monkeypatch.setattr(pipe, "continue_from", lambda prompts: together.append(len(prompts)) or continue_from(prompts))
    alone = [answer.text for answer in pipe(PROMPTS)]
    assert [answer.text for answer in pipe(PROMPTS, batch_size=3)] == alone
    assert together == [1, 1, 1, 3]


def test_sampled_texts_do_not_depend_on_the_batch(demo):
    pipe = zoo.pipeline(demo, max_new_tokens=12, temperature=1.0, seed=3)
    alone = [answer.text for answer in pipe(PROMPTS)]
    assert [answer.text for answer in pipe(PROMPTS, batch_size=2)] == alone
    assert pipe(PROMPTS[1]).text == alone[1]


def test_the_state_of_an_answer_goes_on(demo, tmp_path):
    """Its tensors were those of inference mode, which nothing may move on."""
    whole = zoo.pipeline(demo, max_new_tokens=20)(PROMPTS[0])
    pipe = zoo.pipeline(demo, max_new_tokens=10)
    first = pipe(PROMPTS[0])
    second, _ = generate(demo, [[]], state=first.state, max_new_tokens=10)
    assert first.text + bytes(second[0].tokens).decode() == whole.text
    assert first.text + "".join(pipe.stream_text("", first.state)) == whole.text
    assert State.load(first.state.save(tmp_path / "neu" / "über.state")).position.tolist() == [len(PROMPTS[0]) + 10]


def test_answers_without_states(demo):
    pipe = zoo.pipeline(demo, max_new_tokens=4, keep_state=False)
    assert [(answer.state, len(answer.text)) for answer in pipe(PROMPTS)] == [(None, 4)] * 3


def test_a_given_state_stays_as_it_is():
    """Going on from it twice gave two different texts."""
    model = small()
    state = model.prefill(torch.tensor([[1, 2, 3]]))
    texts = [generate(model, prompts, state=state, max_new_tokens=6)[0][0].tokens for prompts in ([[]], [[7]], [[]])]
    assert texts[0] == texts[2]
    assert state.position.tolist() == [3]


# -- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [None, "ngram"])
@pytest.mark.parametrize(("first", "last"), [(4, 5), (5, 8), (5, 6), (0, 1), (7, 12)])
def test_stop_strings_inside_tokens(first, last, speculative):
    """What stands behind a stop string in its token is not shown, and the state has not read the stop string."""
    model = small()
    whole = TextGeneration(model, tokenizer=Pairs(), max_new_tokens=10)("abcd")
    stop = whole.text[first:last]
    pipe = TextGeneration(model, tokenizer=Pairs(), max_new_tokens=10, stop=["zz", stop], speculative=speculative)
    answer = pipe("abcd")
    kept = whole.text[: whole.text.find(stop)]
    assert (answer.text, answer.reason) == (kept, "string")
    assert "".join(pipe.stream_text("abcd")) == kept
    read = len(kept) // 2  # whole tokens
    for state in (answer.state, pipe.last_state):
        assert state.position.tolist() == [2 + read]
        expected = model.prefill(torch.tensor([Pairs().encode("abcd") + Pairs().encode(kept)[:read]]))
        torch.testing.assert_close(state.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_pieces_are_whole_characters(demo):
    """Bytes of one character come one by one; cut characters are shown at the end alone."""
    for prompt, temperature in (("Gott sprach: über ", 5.0), ("And God", 0.0)):
        pipe = zoo.pipeline(demo, max_new_tokens=60, temperature=temperature)
        pieces = list(pipe.stream_text(prompt))
        assert "".join(pieces) == pipe(prompt).text
        assert all(piece for piece in pieces)


class Words:
    """A blank before each word but the first, as SentencePiece decodes; "é" and "ü" come as two tokens."""

    words = ("the", "end", "is", "near", "é", "ü")

    def __call__(self, ids):
        text, i = [], 0
        for i, token in enumerate(ids):
            if token < 4:
                text.append(" " + self.words[token])
            elif token % 2 == 0:  # first half of a character
                text.append(self.words[4 + (token - 4) // 2] if ids[i + 1 : i + 2] == [token + 1] else MARK)
        return "".join(text).removeprefix(" ")


def test_what_comes_piece_by_piece_is_the_whole():
    decode = Words()
    ids = [0, 1, 2, 3, 4, 5, 1, 6, 7, 0, 0, 3, 6]
    growing = Growing(decode)
    pieces = [growing.add(token) for token in ids]
    assert "".join(pieces) + growing.rest == decode(ids)
    assert pieces[:6] == ["the", " end", " is", " near", "", "é"]
    assert growing.rest == MARK


def test_ends_are_found_wherever_they_stand():
    decode = Words()
    ids = [0, 1, 2, 3, 4, 5, 1, 6, 7, 0]
    for stop in ("end", "d is", "nearé", "é end", "the end", "ü", "r"):
        text = Text()
        ends = Ends(text, ["never", stop], decode)
        for token in ids:
            text.tokens.append(token)
            if ends():
                break
        assert text.text == decode(ids)[: decode(ids).find(stop)], stop


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    """All tokens were decoded again for each: three times as long for 4000 bytes."""
    read = []
    text = Text()
    ends = Ends(text, ["never"], lambda ids: read.append(len(ids)) or bytes(ids).decode(errors="replace"))
    for token in b"and it came to pass " * 20:
        text.tokens.append(token)
        assert not ends()
    assert max(read) < 5


def test_a_stop_string_that_only_began_is_shown(demo):
    plain = zoo.pipeline(demo, max_new_tokens=8)(PROMPTS[0]).text
    pipe = zoo.pipeline(demo, max_new_tokens=8, stop=plain[-2:] + "never")
    assert "".join(pipe.stream_text(PROMPTS[0])) == plain


def test_one_stop_string_is_one(demo):
    """A string in place of a list of them is not its characters."""
    decode = ByteTokenizer().decode
    (one,), _ = generate(demo, [list(b"And God")], max_new_tokens=20, stop_strings="xyz!", decode=decode)
    assert one.reason == "length"
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(demo, [[65]], stop_strings=[""], decode=decode)
    with pytest.raises(zoo.errors.BadArgument, match="a stop string is empty"):
        zoo.pipeline(demo, stop="")


# -- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-20])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.tensor([1.0, 5.0, 4.9, -80.0])
    assert choose(logits, [], Sampling(temperature), torch.Generator().manual_seed(0)) == 1


def test_top_k_is_k_of_them_among_equals():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 9):
        found = {choose(torch.zeros(5), [], Sampling(1.0, top_k=k), generator) for _ in range(200)}
        assert len(found) == min(k, 5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_choose_nothing(broken, temperature):
    """Greedy decoding gave token 0 for ever."""
    with pytest.raises(ValueError, match="largest logit is"):
        choose(torch.tensor([0.0, broken]), [], Sampling(temperature), torch.Generator())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 2.5},
        {"top_k": -1},
        {"top_p": float("nan")},
        {"repetition_penalty": float("inf")},
        {"seed": 1.5},
        {"seed": 2**64},
        {"seed": ["a"]},
    ],
)
def test_options_out_of_range(bad):
    (name,) = bad
    with pytest.raises(zoo.errors.BadArgument, match=f"{name} is .*; expected"):
        Sampling(**bad)


def test_seeds():
    model = small()
    texts = [generate(model, [[1, 2]], sampling=Sampling(1.0, seed=2**64 - 1), max_new_tokens=8)[0] for _ in range(2)]
    assert texts[0][0].tokens == texts[1][0].tokens
    generate(model, [[1], [2]], sampling=Sampling(1.0, seed=2**64 - 1), max_new_tokens=1)  # the next one is 0
    counts = {"max_new_tokens": np.int64(4), "stop_tokens": np.int64(1)}
    plain = generate(model, [[1, 2]], sampling=Sampling(1.0, seed=3), max_new_tokens=4, stop_tokens=1)[0]
    assert generate(model, [[1, 2]], sampling=Sampling(1.0, seed=np.int64(3)), **counts)[0][0].tokens == plain[0].tokens
    with pytest.raises(ValueError, match="1 seeds for 2 texts"):
        generate(model, [[1], [2]], sampling=Sampling(1.0, seed=[1]))


# -- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "prompts is a str"),
        (["text"], "prompt 0 is 'text'; expected a list of token ids"),
        ([1, 2], "prompt 0 is 1; expected a list of token ids"),
        ([[1.5]], r"prompt 0 has the token 1\.5; expected whole numbers"),
        (None, "prompts is a NoneType"),
    ],
)
def test_prompts_that_are_none(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), prompts)


def test_prompts_as_tensors():
    model = small()
    expected = generate(model, [[1, 2], [3, 4]], max_new_tokens=4)[0]
    for prompts in (torch.tensor([[1, 2], [3, 4]]), [torch.tensor([1, 2]), torch.tensor([3, 4])]):
        assert [text.tokens for text in generate(model, prompts, max_new_tokens=4)[0]] == [t.tokens for t in expected]


@pytest.mark.parametrize("given", [None, 5, b"And", ["a"], {"a": 1}])
def test_prompts_that_are_no_text(demo, given):
    """Their Python form was continued: "None", "5", "b'And'"."""
    with pytest.raises(zoo.errors.BadArgument, match="a prompt is a"):
        zoo.pipeline(demo)([given])


def test_ids_and_lengths_that_the_model_does_not_have():
    model = small()
    for bad in (-1, 60):
        with pytest.raises(ValueError, match=f"input_ids holds the token {bad}; this model's ids are 0 to 48"):
            model(torch.tensor([[1, bad]]))
        with pytest.raises(ValueError, match=f"the text has the token {bad}"):
            score(model, [1, bad], text_bytes=2)
    with pytest.raises(ValueError, match=r"lengths are \[5\]; expected each from 0 to 2"):
        model.prefill(torch.tensor([[1, 2]]), lengths=torch.tensor([5]))


def test_scores_that_mean_nothing():
    model = small()
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"window is {window}; expected at least 1"):
            score(model, [1, 2, 3], text_bytes=3, window=window)
    model.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="likelihood is nan"):
        score(model, [1, 2, 3], text_bytes=3)


def test_states(tmp_path):
    state = small().prefill(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="copies is 0"):
        state.fork(0)
    with pytest.raises(FileNotFoundError):
        State.load(tmp_path / "none")
    with pytest.raises(zoo.errors.BadFile, match="is a folder"):
        State.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(zoo.errors.StoreError, match="cannot be written"):
        state.save(tmp_path / "file" / "notes.state")


def test_tokenizer_files(tmp_path):
    from tokenizers import Tokenizer, models

    fast = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    fast.add_special_tokens(["<|endoftext|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    assert HubTokenizer(tmp_path / "tokenizer.json").end_of_text == 3  # where the card names none
    assert HubTokenizer(tmp_path / "tokenizer.json", 1).end_of_text == 1
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(zoo.errors.BadFile, match=r"is no tokenizer\.json"):
        HubTokenizer(tmp_path / "text.json")


# -- the command line -------------------------------------------------------------------------------------------------


def run(command, *arguments, **more):
    return CliRunner().invoke(command, ["mamba2_micro", *map(str, arguments)], **more)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-new-tokens", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "-1"),
        ("--top-p", "0"),
        ("--min-p", "1"),
        ("--repetition-penalty", "0"),
        ("--seed", "99999999999999999999"),
        ("--stop", ""),
        ("--tokenizer", "none.json"),
        ("--draft", "ngram", "--decode-weights", "int8"),
        ("--save-state", "."),
        ("--save-state", "/dev/null/notes.state"),
    ],
)
def test_options_are_refused_before_the_model_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(zoo, "pipeline", None)
    assert run(commands.generate, "And God", *arguments).exit_code == 2


def test_models_that_write_no_text(monkeypatch):
    """Told before their weights are fetched."""
    monkeypatch.setattr(zoo, "pipeline", None)
    result = CliRunner().invoke(commands.generate, ["vim_tiny", "And God"])
    assert result.exit_code == 2
    assert "vim_tiny is for image-classification" in result.output
    with pytest.raises(zoo.errors.BadArgument, match="vim_tiny cannot draft: it is for image-classification"):
        zoo.pipelines.pipeline("mamba2_micro", speculative="vim_tiny")


def test_prompts_in_files(tmp_path):
    (tmp_path / "süß und gut.txt").write_bytes("\ufeffAnd God".encode())
    found = run(commands.generate, "--file", tmp_path / "süß und gut.txt", "--max-new-tokens", 5, "--json")
    answer = json.loads(found.stdout)
    assert answer["prompt"] == "And God"
    assert (answer["tokens"], answer["reason"]) == (5, "length")
    (tmp_path / "latin.txt").write_bytes("säge".encode("latin-1"))
    for command, given in ((commands.generate, ["--file"]), (commands.score, [])):
        assert isinstance(run(command, *given, tmp_path / "latin.txt").exception, zoo.errors.BadFile)
    result = run(commands.generate, input=b"And \xff")
    assert result.exit_code == 2
    assert "no text in UTF-8" in result.output


def test_bytes_of_the_command_line_stay_as_they_are():
    """Python hands bytes that are no UTF-8 on as lone surrogates."""
    assert ByteTokenizer().encode("And \udcff") == list(b"And \xff")


def test_scoring_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in run(commands.score, tmp_path / "empty.txt").output
    (tmp_path / "a.txt").write_text("In the beginning")
    assert run(commands.score, tmp_path / "a.txt", "--window", 0).exit_code == 2


def test_validate_texts(demo, tmp_path):
    texts = {"a.txt": "In the beginning", "b.md": "And God said", "c.txt": "", "d.csv": "not a text"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    scores = [score(demo, list(text.encode()), text_bytes=len(text), start=10) for text in list(texts.values())[:2]]
    found = zoo.validate(demo, tmp_path)
    assert found.samples == 28
    assert found.metrics["bits_per_byte"] == pytest.approx(sum(s.nats for s in scores) / math.log(2) / 28)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(s.nats for s in scores) / 28))
    assert "1 empty files left out" in found.notes
    assert zoo.validate(demo, tmp_path / "a.txt", window=3).metrics["bits_per_byte"] == pytest.approx(
        scores[0].bits_per_byte, rel=1e-5
    )
    with pytest.raises(zoo.errors.BadArgument, match="is empty; there is nothing to score"):
        zoo.validate(demo, tmp_path / "c.txt")
    with pytest.raises(zoo.errors.BadArgument, match="window is 0"):
        zoo.validate(demo, tmp_path, window=0)


def test_a_conversation_of_another_model_is_refused_at_once(demo, tmp_path):
    notes = small().prefill(torch.tensor([[1]])).save(tmp_path / "notes.state")
    result = run(commands.chat, "--state", notes, input="And God\n\n")
    assert isinstance(result.exception, zoo.errors.BadArgument)
    assert "this state was made by MambaLM" in str(result.exception)


def test_a_conversation_goes_on_behind_what_was_shown(tmp_path):
    """A stop string that ended an answer is not part of what the model has read."""
    notes = tmp_path / "notes.state"
    shown = run(commands.generate, "And God said\n", "--stop", "e", "--max-new-tokens", 40).stdout.removesuffix("\n")
    run(commands.chat, "--state", notes, "--stop", "e", "--max-new-tokens", 40, input="And God said\n\n")
    assert State.load(notes).position.tolist() == [len("And God said\n" + shown)]


def test_cards_say_which_ids_they_take():
    """Without a range `zoo bench` could not make an input for any of them."""
    for name in zoo.list(domain="language"):
        card = zoo.info(name).card
        low, high = card.input["range"]
        vocabulary = card.config.get("vocab_size") or card.config.get("backbone", {}).get("vocab_size", high)
        assert low == 0 < high <= vocabulary, name
