"""The demo checkpoint, and the commands as a user types them, without a network."""

import gzip
import json
import lzma

import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo_language import commands
from zoo_language.generation import generate
from zoo_language.scoring import score
from zoo_language.state import State
from zoo_registry import package_path

PROMPT = "And it came to pass in those days, that "


@pytest.fixture(scope="module")
def model():
    return zoo.load("mamba2_micro")


@pytest.fixture(scope="module")
def chapter():
    """A chapter of the held-out verses."""
    return package_path("zoo_language", "examples/hebrews_11.txt")


def run(command, *arguments, **more):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, **more)
    assert result.exit_code == 0, result.output
    return result.output


def test_beats_compressors_on_text_it_has_not_seen(model, chapter):
    data = chapter.read_bytes()
    found = score(model, list(data), text_bytes=len(data), start=ord("\n")).bits_per_byte
    assert 1.6 < found < 1.9  # this chapter, without what stands before it
    assert found < 8 * len(gzip.compress(data, 9)) / len(data)
    assert found < 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def test_card_states_what_was_measured():
    metrics = {m.name: m.value for m in zoo.info("mamba2_micro").weights.metrics}
    own = metrics.pop("bits per byte")
    assert len(metrics) == 3
    assert all(own < value for value in metrics.values())


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights_cost_little(model, chapter, weights):
    data = list(chapter.read_bytes()[:300])
    plain = score(model, data, text_bytes=300, start=10).bits_per_byte
    small = score(model, data, text_bytes=300, start=10, decoder=model.fast_decoder(weights)).bits_per_byte
    assert small == pytest.approx(plain, rel=0.01)


def test_generate_command(model):
    expected, _ = generate(model, [list(PROMPT.encode())], max_new_tokens=20)
    text = bytes(expected[0].tokens).decode()
    assert run(commands.generate, "mamba2_micro", PROMPT, "--max-new-tokens", 20) == text + "\n"
    found = json.loads(run(commands.generate, "mamba2_micro", PROMPT, "--max-new-tokens", 20, "--json"))
    assert found["text"] == text
    assert run(commands.generate, "mamba2_micro", "--max-new-tokens", 20, input=PROMPT) == text + "\n"


def test_generate_goes_on_from_a_state_file(tmp_path):
    whole = run(commands.generate, "mamba2_micro", PROMPT, "--max-new-tokens", 24)
    notes = tmp_path / "notes.state"
    first = run(commands.generate, "mamba2_micro", PROMPT, "--max-new-tokens", 10, "--save-state", notes)
    assert notes.stat().st_size < 600_000
    second = run(commands.generate, "mamba2_micro", "--state", notes, "--max-new-tokens", 14)
    assert first.removesuffix("\n") + second == whole


def test_generate_stops_and_says_what_is_wrong(tmp_path):
    text = run(commands.generate, "mamba2_micro", PROMPT, "--stop", " ", "--max-new-tokens", 40)
    assert " " not in text
    result = CliRunner().invoke(commands.generate, ["mamba2_micro", "x", "--file", __file__])
    assert result.exit_code == 2
    assert "PROMPT or --file, not both" in result.output
    result = CliRunner().invoke(commands.generate, ["mamba2_micro", "--state", str(tmp_path / "none.state")])
    assert "there is no state file" in result.output


def test_generate_with_smaller_weights(model):
    found = run(commands.generate, "mamba2_micro", PROMPT, "--max-new-tokens", 20, "--decode-weights", "int8")
    expected, _ = generate(model, [list(PROMPT.encode())], max_new_tokens=20, decoder=model.fast_decoder("int8"))
    assert found == bytes(expected[0].tokens).decode() + "\n"


def test_score_command(model, chapter):
    found = json.loads(run(commands.score, "mamba2_micro", chapter, "--json"))
    data = chapter.read_bytes()
    expected = score(model, list(data), text_bytes=len(data), start=10)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert found["tokens"] == len(data)  # a byte that is not predicted would be counted as free
    assert "bits/byte" in run(commands.score, "mamba2_micro", chapter)


def test_chat_remembers_in_a_file(tmp_path):
    notes = tmp_path / "chat.state"
    run(commands.chat, "mamba2_micro", "--state", notes, "--max-new-tokens", 8, input="And God said\n\n")
    once = int(State.load(notes).position[0])
    assert once == len("And God said\n") + 8
    result = run(commands.chat, "mamba2_micro", "--state", notes, "--max-new-tokens", 8, input="And the earth\n\n")
    assert f"going on after {once} tokens" in result
    assert int(State.load(notes).position[0]) == once + len("And the earth\n") + 8


def test_pipeline(model):
    pipe = zoo.pipeline("mamba2_micro", max_new_tokens=12)
    both = pipe([PROMPT, "And God"])
    assert [r.text for r in both] == [pipe(PROMPT).text, pipe("And God").text]


def test_sharded_files_and_dtypes(model, tmp_path):
    folder = zoo.save(model, tmp_path / "shards", shard_bytes=500_000)
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = zoo.load(str(folder))
    for (name, own), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(own, other), name
    half = zoo.load(str(folder), dtype="bfloat16")
    assert half.embedding.weight.dtype == torch.bfloat16
    ids = torch.tensor([list(PROMPT.encode())])
    with torch.no_grad():
        want, found = model(ids), half(ids).float()
    assert float((found - want).abs().max() / want.abs().max()) < 0.05
