"""zoo train-audio: recordings to a model of sound that zoo generate-audio and zoo validate read."""

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
from zoo_audio.generation import bits_per_sample
from zoo_audio.mulaw import mu_law_encode
from zoo_audio.sounds import NOTHING, Sounds, bits, default_length, find_audio, likelihood, read_tokens, windows

TINY = {"d_model": 8, "layer": {"mode": "nplr", "d_state": 8, "n_ssm": 1, "dt_transform": "softplus"}}
SIZES = ["--set", "d_model=8", "--set", f"layer={json.dumps(TINY['layer'])}"]


def tones(folder: Path, count: int, seed: int = 0) -> Path:
    """Tones of one of two pitches, at two rates."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(count):
        rate = (8000, 16000)[i % 2]
        t = np.arange(int(draw.uniform(0.1, 0.2) * rate)) / rate
        soundfile.write(folder / f"{i}.wav", 0.5 * np.sin(2 * np.pi * (500, 1000)[i // 2 % 2] * t), rate)
    return folder


def test_it_learns_and_the_saved_folder_measures_the_same(tmp_path, capsys):
    data, held, out = tones(tmp_path / "data", 8), tones(tmp_path / "held" / "below", 3, 1).parent, tmp_path / "out"
    words = ["--validation", str(held), "--steps", "60", "--rate", "1e-2", "--length", "256", "--batch-size", "4"]
    assert run(["train-audio", "sashimi_micro", str(data), "--out", str(out), *words, *SIZES, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    sounds = [read_tokens(path, 8000) for path in find_audio(held)]
    shares = np.bincount(np.concatenate(sounds), minlength=256) / sum(map(len, sounds))
    table = -sum(p * np.log2(p) for p in shares if p)
    assert said["metrics"]["bits per sample"] < 0.9 * table  # less than their own frequencies need
    assert zoo.validate(out, held).metrics == pytest.approx(said["metrics"], rel=1e-6)
    assert default_length(zoo.load(out)) == 256
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert run(["generate-audio", str(out), "--seconds", "0.01", "--out", str(tmp_path / "made.wav")]) == 0
    assert soundfile.info(tmp_path / "made.wav").samplerate == 8000


def test_an_interrupted_run_goes_on(tmp_path):
    sounds = [read_tokens(path, 8000) for path in find_audio(tones(tmp_path / "data", 3))]

    def train(run, report):
        torch.manual_seed(1)
        model = zoo.create("sashimi_micro", **TINY)
        fit(model, Sounds(sounds, 64, 2, seed=3), likelihood, Settings(steps=4, rate=1e-2), run=run, report=report)
        return model

    (tmp_path / "run").mkdir()
    zoo.testing.check_resume(train, tmp_path / "run")


def test_windows_hold_every_sample_once():
    sounds = [np.arange(n, dtype=np.uint8) for n in (70, 5, 32)]
    places = windows(sounds, 32)
    assert places == [(0, 0), (0, 32), (0, 64), (1, 0), (2, 0)]
    batches = Sounds(sounds, 32, 5, seed=1)
    assert torch.equal(batches(2), batches(2))
    rows = batches(0)
    assert rows.shape == (5, 32)
    for row in rows:
        known = row[row != NOTHING]
        assert len(known) in (5, 32)  # moved to lie in the recording, where that is long enough
        assert (known.diff() == 1).all()
    starts = {int(row[0]) for index in range(20) for row in batches(index)}
    assert len(starts) > 12


def test_bits_are_those_of_generation():
    torch.manual_seed(0)
    model = zoo.create("sashimi_micro", **TINY).eval()
    tokens = torch.randint(256, (1, 96))
    sound = tokens[0].numpy().astype(np.uint8)
    assert bits(model, [sound], 96) == pytest.approx(bits_per_sample(model, tokens), rel=1e-6)
    other = torch.randint(256, (40,)).numpy().astype(np.uint8)
    parts = [sound[:64], sound[64:], other]
    alone = sum(len(p) * bits_per_sample(model, torch.from_numpy(p.astype(np.int64))[None]) for p in parts) / 136
    assert bits(model, [sound, other], 64, batch_size=2) == pytest.approx(alone, rel=1e-5)
    padded = torch.cat([tokens, torch.full((1, 8), NOTHING)], dim=1)
    assert likelihood(model, padded).item() == pytest.approx(likelihood(model, tokens).item(), rel=1e-5)


def test_recordings_are_read_as_the_pipeline_reads_them(tmp_path):
    path = tones(tmp_path / "data", 2) / "1.wav"  # 16 kHz
    model = zoo.create("sashimi_micro", **TINY)
    pipe = zoo.pipeline(model, "audio-generation")
    prompt = pipe.prepare(pipe.read(path))["prompt"]
    assert read_tokens(path, 8000).tolist() == prompt.tolist()
    assert prompt.max() < 245  # as loud as it is: half of full scale
    assert mu_law_encode(torch.ones(1, 1, 1), scale=False).item() == 255


@pytest.mark.parametrize(("name", "ends"), [("sashimi_micro", {"A_real", "A_imag", "B", "P", "inv_dt"}),
                                            ("samba_asr_micro", {"A_log"})])  # fmt: skip
def test_state_matrices_are_not_decayed(name, ends):
    model = zoo.create(name, device="meta")
    assert {key.rpartition(".")[2] for key in model.no_weight_decay()} == ends


def test_what_is_wrong_is_said_before_the_training(tmp_path, capsys):
    data, out = tones(tmp_path / "data", 3), tmp_path / "out"

    def refused(*words: str, name: str = "sashimi_micro", folder: Path = data) -> str:
        assert run(["train-audio", name, str(folder), "--out", str(out), "--steps", "1", *words])
        assert not out.exists()
        return capsys.readouterr().err

    assert "is for speech-recognition" in refused(name="samba_asr_micro")
    assert "the model is of 20 tokens" in refused("--set", "vocab_size=20")
    (tmp_path / "empty").mkdir()
    assert "holds no audio file" in refused(folder=tmp_path / "empty")
    soundfile.write(data / "nothing.wav", np.zeros(0), 8000)
    assert "nothing.wav holds no samples" in refused()
    (data / "nothing.wav").write_bytes(b"RIFF")
    assert "nothing.wav cannot be read as audio" in refused()
    (data / "nothing.wav").unlink()
    assert "none can be held out" in refused(folder=data / "0.wav")
