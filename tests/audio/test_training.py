"""zoo train-speech: recordings that people have to a recogniser that the pipeline and zoo validate read."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, fit
from zoo_audio import recordings
from zoo_audio.decoding import ctc_greedy
from zoo_audio.features import LogMel
from zoo_audio.manifests import read_manifest
from zoo_audio.recordings import Buckets, Recording, Spoken, masked, survey
from zoo_audio.text import Tokenizer, train_tokenizer
from zoo_registry import errors

WORDS = {"one": 500, "two": 1000, "three": 2000}
#: a recogniser of a moment
TINY = {"dim": 32, "n_enc": 2, "n_dec": 0, "n_mels": 20, "tie": False}
SIZES = [word for k, v in TINY.items() for word in ("--set", f"{k}={json.dumps(v)}")]


def spoken(text: str, rate: int, draw: np.random.Generator) -> np.ndarray:
    """A tone for each word."""
    pause = np.zeros(int(0.08 * rate))
    parts = [pause]
    for word in text.split():
        t = np.arange(int(draw.uniform(0.22, 0.3) * rate)) / rate
        parts += [np.sin(2 * np.pi * WORDS[word] * t) * np.hanning(len(t)) * draw.uniform(0.3, 0.8), pause]
    return np.concatenate(parts).astype(np.float32)


def speech(folder: Path, count: int) -> Path:
    """A list of ``count`` recordings at three rates, some of two channels."""
    draw, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for i in range(count):
        text = " ".join(draw.choice(list(WORDS), draw.integers(1, 4)))
        rate = (8000, 16000, 22050)[i % 3]
        sound = spoken(text, rate, draw)
        soundfile.write(folder / f"{i}.wav", sound if i % 2 else np.stack([sound, 0.5 * sound], axis=1), rate)
        lines.append(f"{i}.wav\t{text}\n")
    (folder / "list.tsv").write_text("".join(lines))
    return folder / "list.tsv"


def test_it_learns_and_the_saved_folder_measures_the_same(tmp_path, capsys):
    data, held, out = speech(tmp_path / "data", 32), speech(tmp_path / "held", 6), tmp_path / "out"
    words = ["--validation", str(held), "--steps", "70", "--rate", "5e-3", "--batch-size", "8", "--no-augment"]
    words += ["--json", *SIZES]
    assert run(["train-speech", "samba_asr_micro", str(data), "--out", str(out), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"]["WER"] < 0.35  # "one" to everything: more than 0.5
    assert (said["recordings"], said["held_out"], said["left_out"]) == (32, 6, 0)
    found = zoo.validate(out, held).metrics
    assert {k: found[k] for k in ("WER", "CER")} == said["metrics"]
    card = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert {m["name"]: m["value"] for m in card["metrics"]} == said["metrics"]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert run(["transcribe", str(out), str(held.parent / "1.wav")]) == 0
    assert set(capsys.readouterr().out.partition(":")[2].split()) <= set(WORDS)


def test_a_start_keeps_its_vocabulary(tmp_path, capsys):
    data, out = speech(tmp_path / "data", 3), tmp_path / "out"
    words = ["train-speech", "samba_asr_micro", str(data), "--out", str(out), "--start", "samba_asr_micro.commands"]
    assert run([*words, "--steps", "1", "--rate", "1e-9", "--held-out", "0", "--batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {}
    example = Path(recordings.__file__).parent / "examples" / "sample_1.wav"
    assert zoo.pipeline(str(out))(example).text == zoo.pipeline("samba_asr_micro.commands")(example).text
    (tmp_path / "large.json").write_text(train_tokenizer([" ".join(map(chr, range(0x4E00, 0x4EA0)))], 1).text)
    assert run([*words, "--vocabulary", str(tmp_path / "large.json")]) != 0
    assert "expected the tokenizer that the model was trained with" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(tmp_path):
    pairs = read_manifest(speech(tmp_path / "data", 5))
    tokenizer = train_tokenizer([text for _, text in pairs], 1)

    def train(run, report):
        torch.manual_seed(1)
        model = zoo.create(
            "samba_asr_micro", **TINY | {"n_dec": 1, "tie": True}, vocab_size=len(tokenizer), dropout=0.2
        )
        known, _ = survey(pairs, model, tokenizer)
        batches = Spoken(known, LogMel(20, scaling="fixed"), 2, seed=3)
        fit(model, batches, lambda m, b: m.loss(*b), Settings(steps=4, rate=1e-2), run=run, report=report)
        return model

    (tmp_path / "run").mkdir()
    zoo.testing.check_resume(train, tmp_path / "run")


def test_batches_hold_recordings_of_like_length_once_an_epoch(tmp_path):
    seconds = np.random.default_rng(0).uniform(1, 20, 50)
    order = Buckets(seconds, 4, seed=2)
    batches = [order(index) for index in range(2 * order.each)]
    for epoch in (batches[: order.each], batches[order.each :]):
        seen = [i for batch in epoch for i in batch]
        assert set(seen) == set(range(50))
        assert len(seen) == 52  # the last batch is filled up
        assert np.mean([np.ptp(seconds[batch]) for batch in epoch]) < 4
    assert batches[: order.each] != batches[order.each :]
    assert Buckets(seconds, 4, seed=2)(7) == batches[7] == order(7)  # asked out of turn
    assert order.random(3).random() == Buckets(seconds, 4, seed=2).random(3).random()
    assert sorted(Buckets([1.0, 2.0], 5)(0)) == [0, 0, 0, 1, 1]


def test_a_batch_is_what_the_pipeline_hears(tmp_path):
    pairs = read_manifest(speech(tmp_path / "data", 3))
    tokenizer = train_tokenizer([text for _, text in pairs], 1)
    model = zoo.create("samba_asr_micro", **TINY, vocab_size=len(tokenizer)).eval()
    known, refused = survey(pairs, model, tokenizer)
    assert not refused
    batches = Spoken(known, LogMel(20, scaling="fixed"), 3, augment=False)
    features, frames, tokens, lengths = batches(0)
    rows = batches.order(0)
    pipe = zoo.pipeline(model, "speech-recognition", tokenizer=tokenizer)
    for row, i in enumerate(rows):
        hidden, _ = model.encode(features[row, None, : frames[row]])
        heard = [tokenizer.piece(t) for t in ctc_greedy(model.ctc(hidden)[0]).tokens]
        written = [token.text for token in pipe(pairs[i][0]).tokens]
        assert len(written) > 2
        assert heard[-len(written) :] == written  # nothing is written before the first sound
        assert tokenizer.decode(tokens[row, : lengths[row]].tolist()) == pairs[i][1]
        assert not features[row, frames[row] :].any()
    model.loss(features, frames, tokens, lengths).backward()


def test_masks_follow_the_draw():
    features = torch.rand(200, 80)
    found = masked(features, np.random.default_rng(4))
    assert torch.equal(found, masked(features, np.random.default_rng(4)))
    changed = found != features
    bands, stretches = changed.all(dim=0).sum(), changed.all(dim=1).sum()
    assert 0 < bands <= 2 * 27
    assert 0 < stretches <= 2 * 40
    assert torch.equal(changed, changed.all(dim=0)[None] | changed.all(dim=1)[:, None])
    assert masked(features[:1], np.random.default_rng(0)).shape == (1, 80)


def test_recordings_that_cannot_be_learned_from_are_named(tmp_path):
    draw = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", draw.normal(0, 0.1, 4800), 16000)  # 0.3 s: 8 positions of 40 ms
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 100), 100)
    tokenizer = train_tokenizer(["abcdefgh"], 1)
    model = zoo.create("samba_asr_micro", **TINY, vocab_size=len(tokenizer))
    said = ["abcdefg", "abcdefgh", "abcdeff", "abcdefff", "...", "a"]
    pairs = [(tmp_path / "a.wav", text) for text in said[:-1]] + [(tmp_path / "long.wav", "a")]
    found, refused = survey(pairs, model, tokenizer)
    # the mark of the word is a token as well
    assert [r.tokens for r in found] == [tokenizer.encode("abcdefg")]
    assert found[0] == Recording(tmp_path / "a.wav", found[0].tokens, 0.3)
    assert ["8 positions, and its text needs 9" in r for r in refused[:3]] == [True, True, False]
    assert "needs 11" in refused[2]
    assert "nothing is said" in refused[3]
    assert "31.0 s; at most 30 s" in refused[4]
    decoder = zoo.create("samba_asr_base", **{"dim": 16, "n_enc": 1, "n_dec": 1}, vocab_size=len(tokenizer))
    assert len(survey(pairs, decoder, tokenizer)[0]) == 4  # which writes as much as it likes


def test_lists_of_recordings(tmp_path):
    audio = np.zeros(160)
    book = tmp_path / "libri" / "19" / "198"
    book.mkdir(parents=True)
    for name in ("19-198-0000", "19-198-0001"):
        soundfile.write(book / f"{name}.flac", audio, 16000)
    (book / "19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n")
    assert read_manifest(tmp_path / "libri") == [
        (book / "19-198-0000.flac", "NORTHANGER ABBEY"), (book / "19-198-0001.flac", "THIS LITTLE WORK"),
    ]  # fmt: skip
    soundfile.write(tmp_path / "a.wav", audio, 16000)
    one = [(tmp_path / "a.wav", "say, what")]
    for name, text in (
        ("list.csv", 'client,path,sentence\n7,a.wav,"say, what"\n'),
        ("voice.tsv", "client_id\tpath\tsentence\tup_votes\n7\ta.wav\tsay, what\t2\n"),
        ("plain.tsv", "a.wav\tsay, what\n"),
        ("list.jsonl", '{"audio_filepath": "a.wav", "duration": 0.01, "text": "say, what"}\n\n'),
    ):
        (tmp_path / name).write_text(text)
        assert read_manifest(tmp_path / name) == one, name
    for name, text, message in (
        ("bad.csv", "a.wav,say\n", "names the columns a.wav, say; expected one of audio"),
        ("bad.csv", "audio,text\na.wav\n", "line 2 of .* has 1 columns; expected 2"),
        ("bad.csv", "audio,text\nb.wav,say\n", "line 2 of .* names 'b.wav'; there is no such file"),
        ("bad.jsonl", '{"audio": "a.wav"}\n', "expected the keys audio or"),
        ("bad.jsonl", "a.wav say\n", "line 1 of .* is no JSON"),
        ("bad.jsonl", "", "names no audio file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(errors.BadArgument, match=message):
            read_manifest(tmp_path / name)
    (book / "19-198.trans.txt").write_text("19-198-0007 GONE\n")
    with pytest.raises(errors.BadArgument, match=r"names '19-198-0007.flac'"):
        read_manifest(tmp_path / "libri")


def test_a_tokenizer_is_what_its_text_says(tmp_path):
    characters = train_tokenizer(["Hello, world"], 1)
    assert len(characters) == 3 + len(set("helloworld")) + 1  # and the mark of words
    again = Tokenizer.of(characters.text)
    assert again.decode(again.encode("low hello")) == "low hello"
    assert len(train_tokenizer(["hello hello world"], 14, tmp_path / "t.json")) == 14
    assert Tokenizer(tmp_path / "t.json").encode("hello")
    with pytest.raises(errors.BadFile, match=r"is no tokenizer\.json"):
        Tokenizer.of("{}")


def test_what_is_wrong_is_said_before_the_training(tmp_path, capsys):
    data, out = speech(tmp_path / "data", 3), tmp_path / "out"

    def refused(*words: str, name: str = "samba_asr_micro", manifest: Path = data) -> str:
        assert run(["train-speech", name, str(manifest), "--out", str(out), *SIZES, "--steps", "1", *words])
        assert not out.exists()
        return capsys.readouterr().err

    assert "is for audio-generation" in refused(name="sashimi_micro")
    assert "different characters, give at least" in refused("--vocabulary", "5")
    assert "expected 'characters', a number of pieces" in refused("--vocabulary", "letters")
    assert "the vocabulary has" in refused("--set", "vocab_size=5")
    assert "is a samba_asr_micro" in refused("--start", "samba_asr_micro.commands", name="samba_asr_base")
    (data.parent / "1.wav").write_bytes(b"RIFF")
    assert "1.wav cannot be read as audio" in refused()
    (data.parent / "one.tsv").write_text("0.wav\tone two\n")
    assert "none can be held out" in refused(manifest=data.parent / "one.tsv")
    (data.parent / "one.tsv").write_text("0.wav\t...\n")
    said = refused("--held-out", "0", "--vocabulary", str(_tokenizer(tmp_path)), manifest=data.parent / "one.tsv")
    assert "nothing is said in its text '...'" in said
    assert "no recording of" in said


def _tokenizer(folder: Path) -> Path:
    train_tokenizer(["one two three"], 1, folder / "tokenizer.json")
    return folder / "tokenizer.json"
