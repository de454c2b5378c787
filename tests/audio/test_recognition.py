"""From recordings to text: streams against the whole, long recordings, times, error rates, the command line."""

import json

import click
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

import zoo
from zoo.cli.validate import validate
from zoo_audio.commands import generate_audio, transcribe
from zoo_audio.metrics import error_rates
from zoo_audio.pipelines import SpeechRecognition, quiet_cuts
from zoo_audio.samba_asr import SambaASR
from zoo_audio.streaming import Recogniser
from zoo_audio.text import Tokenizer, normalise, train_tokenizer, words_of
from zoo_audio.validation import read_manifest

CAUSAL = {
    "vocab_size": 40, "dim": 16, "n_enc": 2, "n_dec": 1, "n_mels": 20, "d_state": 4, "bidirectional": False,
    "scaling": "fixed", "ctc": True, "strides": (2, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer(["one two three", "three four", "open the door", "o'clock"] * 3, 40, path)


@pytest.fixture(scope="module")
def talkative():
    """A model with random weights whose blank is unlikely, so that it writes a lot."""
    torch.manual_seed(0)
    model = SambaASR(**CAUSAL).eval()
    with torch.no_grad():
        model.ctc.weight.mul_(3)
        model.ctc.bias[:3] -= 1
    return model


def speech(seconds, rate=16000, seed=0):
    draw = np.random.default_rng(seed)
    envelope = np.abs(np.sin(np.linspace(0, 9 * seconds, int(seconds * rate))))
    return (draw.standard_normal(int(seconds * rate)) * envelope * 0.2).astype(np.float32)


# -- text --------------------------------------------------------------------------------------------------------------


def test_tokens_there_and_back(tokenizer):
    for text in ("one two", "the door", "o'clock four"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 1, 2, *tokenizer.encode("Two, THREE!")]) == "two three"
    assert tokenizer.piece(10_000) == ""
    assert len(tokenizer) <= 40


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer(tmp_path / "a.json")


def test_another_models_tokenizer(tokenizer):
    with pytest.raises(zoo.errors.BadArgument, match=r"has \d+ tokens and SambaASR 5"):
        SpeechRecognition(SambaASR(**CAUSAL | {"vocab_size": 5}), tokenizer=tokenizer)


def test_words_from_pieces():
    assert words_of(["\u2581se", "ven", "\u2581", "\u2581two"]) == [("seven", 0, 2), ("two", 3, 4)]
    assert words_of(["x", "\u2581y"]) == [("x", 0, 1), ("y", 1, 2)]
    assert normalise("Don't  STOP -- 'now'!") == "don't stop now"


def test_error_rates_on_fixed_strings():
    rates = error_rates(["one two three four", "stop"], ["one too three", "stop now"])
    assert (rates.substitutions, rates.deletions, rates.insertions, rates.words) == (1, 1, 1, 5)
    assert rates.wer == 3 / 5
    assert error_rates(["One, two."], ["one two"]).wer == 0
    assert error_rates(["", "one"], ["two words", "one"]).wer == 2  # words where nothing was said
    assert error_rates(["abcd"], ["abed"]).cer == 1 / 4
    with pytest.raises(ValueError, match="no words"):
        error_rates([""], [""])
    with pytest.raises(ValueError, match="as many"):
        error_rates(["a"], [])


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_stream_writes_what_the_whole_does(talkative, tokenizer, rate):
    audio = np.concatenate([np.zeros(rate // 3, np.float32), speech(2.0, rate)])
    whole = SpeechRecognition(talkative, tokenizer=tokenizer)((audio, rate))
    assert len(whole.tokens) > 10
    for piece in (0.01, 0.32, 1.0):
        stream, heard = Recogniser(talkative, tokenizer, rate=rate), []
        size = int(piece * rate)
        for start in range(0, len(audio), size):
            heard += stream.push(audio[start : start + size])
        heard += stream.finish()
        assert stream.text == whole.text
        assert heard == stream.tokens == whole.tokens
        assert stream.words == whole.words
    assert stream.speed.lookahead == pytest.approx(0.0425)
    assert stream.speed.audio == pytest.approx(len(audio) / rate, abs=0.01)
    assert "real-time factor" in str(stream.speed)


def test_the_stream_is_the_model_on_the_whole(talkative, tokenizer):
    """Not only equal to itself: equal to features, encoder and CTC of the whole recording at once."""
    from zoo_audio.decoding import ctc_greedy
    from zoo_audio.features import LogMel

    audio = speech(1.5)
    with torch.no_grad():
        hidden, _ = talkative.encode(LogMel(20, scaling="fixed")(torch.from_numpy(audio)[None]))
        expected = ctc_greedy(talkative.ctc(hidden)[0])
    found = SpeechRecognition(talkative, tokenizer=tokenizer)((audio, 16000))
    assert found.text == tokenizer.decode(expected.tokens)
    assert [t.start for t in found.tokens] == [pytest.approx(0.04 * p) for p in expected.positions]


def test_the_decoder_streams_by_agreement(talkative, tokenizer, monkeypatch):
    """In one piece it is the offline answer; in several the committed text only grows."""
    monkeypatch.setattr("zoo_audio.streaming.decode_greedy", limited)
    monkeypatch.setattr("zoo_audio.pipelines.decode_greedy", limited)
    audio = speech(1.2)
    whole = SpeechRecognition(talkative, tokenizer=tokenizer, decoding="decoder")((audio, 16000))
    one = Recogniser(talkative, tokenizer, decoding="decoder")
    first = one.push(audio)
    assert first == []  # nothing to agree with yet
    one.finish()
    assert one.text == whole.text
    several, seen = Recogniser(talkative, tokenizer, decoding="decoder"), []
    for piece in np.array_split(audio, 4):
        seen += several.push(piece)
        assert [t.text for t in several.tokens] == [t.text for t in seen]
    seen += several.finish()
    assert [t.text for t in several.tokens] == [t.text for t in seen]


def limited(model, hidden, **options):
    from zoo_audio.decoding import decode_greedy

    return decode_greedy(model, hidden, max_tokens=12, **options)


def test_memory_does_not_grow_with_the_recording(talkative, tokenizer):
    stream = Recogniser(talkative, tokenizer)

    def held():
        tensors = [stream.features.kept, *stream.front, *(t for s in stream.encoder for t in s.values())]
        return sum(t.numel() for t in tensors)

    sizes = []
    for i in range(12):
        stream.push(speech(0.5, seed=i))
        sizes.append(held())
    assert max(sizes[2:]) - min(sizes[2:]) <= 2 * 400  # at most a few frames that wait
    assert stream.read > 140


def test_silence_has_no_text(talkative, tokenizer):
    pipe = SpeechRecognition(talkative, tokenizer=tokenizer)
    answer = pipe((np.zeros(16000, np.float32), 16000))
    assert (answer.text, answer.words, answer.notes) == ("", [], ["silence"])
    assert "nothing was said" in answer.summary()
    assert pipe((np.zeros(0, np.float32), 16000)).notes == ["no samples"]
    assert pipe((speech(0.004), 16000)).text == ""  # less than one frame
    late = pipe((np.concatenate([np.zeros(32000, np.float32), speech(1.0)]), 16000))
    assert min(t.start for t in late.tokens) >= 1.9


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_beams_and_heads(talkative, tokenizer):
    audio = (speech(0.8), 16000)
    for options in ({"beam": 4}, {"decoding": "ctc", "beam": 2}):
        answer = SpeechRecognition(talkative, tokenizer=tokenizer, **options)(audio)
        starts = [t.start for t in answer.tokens]
        assert starts == sorted(starts)
        assert answer.words[0].end > answer.words[0].start
    with pytest.raises(ValueError, match="expected 'ctc' or 'decoder'"):
        SpeechRecognition(talkative, tokenizer=tokenizer, decoding="magic")
    with pytest.raises(ValueError, match="beam is 0"):
        SpeechRecognition(talkative, tokenizer=tokenizer, beam=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        SpeechRecognition(talkative)
    with pytest.raises(ValueError, match="needs a SambaASR"):
        SpeechRecognition(torch.nn.Linear(2, 2))


def test_long_recordings_are_cut_where_it_is_quiet():
    audio = speech(7.0, rate=1000)
    audio[2700:2760] = 0
    cuts = quiet_cuts(audio, 1000, 3.0)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == 7000
    assert 2700 <= cuts[0][1] <= 2760
    assert all(b - a <= 3000 for a, b in cuts)
    assert [b for _, b in cuts[:-1]] == [a for a, _ in cuts[1:]]


def test_a_model_that_reads_both_ways(tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = SambaASR(**{**CAUSAL, "bidirectional": True, "scaling": "utterance"}).eval()
    with torch.no_grad():
        model.ctc.bias[:3] -= 3
    monkeypatch.setattr("zoo_audio.pipelines.LONGEST", 1.0)
    answer = SpeechRecognition(model, tokenizer=tokenizer)((np.stack([speech(2.2)] * 2, 1), 16000))
    assert answer.notes == ["2 channels, averaged"]
    starts = [t.start for t in answer.tokens]
    assert starts == sorted(starts)
    assert starts[-1] > 1.5
    with pytest.raises(ValueError, match="cannot stream"):
        Recogniser(model, tokenizer)


# -- the demo and the command line -------------------------------------------------------------------------------------


def run(command, *arguments):
    """The output of a command; answers are on stdout, speed and notes on stderr."""
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


def refused(command, *arguments):
    """A command whose usage errors are raised instead of being shown."""
    CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)


def samples():
    from zoo_registry import package_path

    text = package_path("zoo_audio", "examples/transcripts.tsv").read_text(encoding="utf-8")
    return [
        (package_path("zoo_audio", f"examples/{a}"), b) for a, b in (line.split("\t") for line in text.splitlines())
    ]


def test_the_demo_understands_its_samples():
    pipe = zoo.pipeline("samba_asr_micro")
    answers = [pipe(path) for path, _ in samples()]
    for answer in answers:
        assert " ".join(w.text for w in answer.words) == answer.text
        assert 0 <= answer.words[0].start < answer.words[-1].end <= answer.seconds + 0.05
    assert error_rates([text for _, text in samples()], [a.text for a in answers]).wer == 0
    assert answer.picture().size == (1000, 240)


def test_transcribe(tmp_path):
    path, text = samples()[0]
    assert text in run(transcribe, "samba_asr_micro", path, "--times", "--pictures", tmp_path).output
    assert len(list(tmp_path.glob("*.png"))) == 1
    streamed = run(transcribe, "samba_asr_micro", path, "--stream")
    assert text in streamed.output
    assert "latency" in streamed.stderr
    assert "real-time factor" in streamed.stderr
    answer = json.loads(run(transcribe, "samba_asr_micro", path, "--json").stdout)[0]
    assert answer["text"] == text
    assert answer["words"][0]["text"] == text.split()[0]


def test_validate_speech(tmp_path):
    lines = []
    for i, (path, text) in enumerate(samples()):
        audio, rate = soundfile.read(path)
        soundfile.write(tmp_path / f"{i}.wav", audio, rate)
        (tmp_path / f"{i}.txt").write_text(text)
        lines.append(f"{i}.wav\t{text}")
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    for given in (tmp_path, tmp_path / "list.tsv"):
        found = json.loads(run(validate, "samba_asr_micro", given, "--json").stdout)
        assert found["metrics"]["WER"] == 0
        assert found["samples"] == len(lines)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"no text beside it; expected 1\.txt"):
        run(validate, "samba_asr_micro", tmp_path)


def test_generate_audio(tmp_path):
    torch.manual_seed(0)
    zoo.save(zoo.create("sashimi_micro"), tmp_path / "model")
    out = tmp_path / "note.wav"
    run(generate_audio, tmp_path / "model", "--seconds", "0.02", "--count", "2", "--out", out)
    for i in (1, 2):
        audio, rate = soundfile.read(tmp_path / f"note_{i}.wav")
        assert (len(audio), rate) == (160, 8000)
        assert (tmp_path / f"note_{i}.png").stat().st_size > 500
    soundfile.write(tmp_path / "end.wav", audio, rate)
    before = set(tmp_path.iterdir())
    for wrong, message in ((("--seconds", "nan"), "positive"), (("--out", tmp_path / "end.wav" / "a.wav"), "written")):
        with pytest.raises((click.UsageError, zoo.errors.StoreError), match=message):
            refused(generate_audio, "not even looked up", "--out", tmp_path / "b.wav", *wrong)
    assert set(tmp_path.iterdir()) == before


def test_recordings_before_a_broken_one_are_answered(tmp_path):
    path, text = samples()[0]
    (tmp_path / "broken.wav").write_text("words")
    for mode in ((), ("--stream",)):
        result = CliRunner().invoke(transcribe, ["samba_asr_micro", str(path), str(tmp_path / "broken.wav"), *mode])
        assert isinstance(result.exception, ValueError)
        assert text in result.stdout
        given = ["samba_asr_micro", str(tmp_path / "broken.wav"), str(path), "--keep-going", *mode]
        result = CliRunner().invoke(transcribe, given, standalone_mode=False)
        assert result.return_value == 1
        assert text in result.stdout
        assert "failed" in result.stdout


def test_a_recording_of_nothing_is_valid_json(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    for mode in ((), ("--stream",)):
        out = run(transcribe, "samba_asr_micro", tmp_path / "none.wav", "--json", *mode).stdout
        answer = json.loads(out, parse_constant=pytest.fail)[0]
        assert (answer["text"], answer.get("real_time_factor"), answer["notes"]) == ("", None, ["no samples"])
    assert "nan" not in run(transcribe, "samba_asr_micro", tmp_path / "none.wav", "--stream").output


def test_what_a_stream_has_no_time_for(tmp_path):
    path, text = samples()[0]
    for wrong in (("--beam", "4"), ("--pictures", tmp_path / "p"), ("--piece", "nan")):
        with pytest.raises(click.UsageError, match=wrong[0]):
            refused(transcribe, "samba_asr_micro", path, "--stream", *wrong)
    shown = run(transcribe, "samba_asr_micro", path, "--stream", "--times").stdout.splitlines()
    assert [line.split()[-1] for line in shown[1:]] == text.split()


def test_a_finished_stream_is_over(talkative, tokenizer):
    stream = Recogniser(talkative, tokenizer)
    stream.push(speech(0.2))
    stream.finish()
    for more in (lambda: stream.push(speech(0.2)), stream.finish):
        with pytest.raises(ValueError, match="finished"):
            more()
    with pytest.raises(ValueError, match="rate is 0"):
        Recogniser(talkative, tokenizer, rate=0)


def test_a_model_keeps_its_dtype():
    model = zoo.load("samba_asr_micro", dtype=torch.bfloat16)
    path, text = samples()[0]
    for decoding in ("ctc", "decoder"):
        assert zoo.pipeline(model, decoding=decoding)(path).text == text
    assert model.ctc.weight.dtype == torch.bfloat16


def test_texts_as_other_programs_write_them(tmp_path):
    path, text = samples()[0]
    audio, rate = soundfile.read(path)
    soundfile.write(tmp_path / "a.wav", audio, rate)
    (tmp_path / "list.tsv").write_bytes(f"\ufeffa.wav\t{text}\r\n".encode())
    assert read_manifest(tmp_path / "list.tsv") == [(tmp_path / "a.wav", text)]
    (tmp_path / "list.tsv").write_text(f"b.wav\t{text}\n")
    with pytest.raises(ValueError, match=r"line 1 .* names 'b\.wav'; there is no such file"):
        read_manifest(tmp_path / "list.tsv")
    (tmp_path / "a.txt").write_bytes("T\xfcr".encode("latin-1"))
    with pytest.raises(zoo.errors.BadFile, match=r"a\.txt is no text in UTF-8"):
        read_manifest(tmp_path)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "lost.txt").write_text("words")
    with pytest.raises(ValueError, match=r"lost\.txt .* has no recording"):
        read_manifest(tmp_path)
