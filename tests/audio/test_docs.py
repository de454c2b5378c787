"""The Python of the documentation runs as it is printed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

import zoo_audio
from zoo.cli import run

ROOT = Path(__file__).parents[2]
PAGES = {"docs": ROOT / "docs" / "audio.md", "README": ROOT / "plugins" / "audio" / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = Path(zoo_audio.__file__).parent / "examples"
    (tmp_path / "plugins" / "audio" / "src" / "zoo_audio").mkdir(parents=True)
    (tmp_path / "plugins" / "audio" / "src" / "zoo_audio" / "examples").symlink_to(examples)
    audio, rate = soundfile.read(examples / "sample_1.wav", dtype="float32")
    for name in ("a.wav", "b.mp3", "call.wav", "note.wav"):
        soundfile.write(name, audio if name != "note.wav" else audio[4000:4200], rate)

    def microphone():
        yield from np.array_split(np.repeat(audio, 3), 9)  # 48 kHz

    # Fewer samples than printed, which changes nothing but the time.
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)
    names = {"microphone": microphone}
    for code in blocks:
        exec(code.replace("samples=4000", "samples=200").replace("seconds=0.25", "seconds=0.01"), names)
    assert names["answer"].text
    if page == "docs":
        assert Path("words.png").is_file()
        assert names["sound"].samples.shape == (2, 200)
    else:
        assert names["stream"].speed.audio > 0.5


def test_training_runs_as_printed(tmp_path, monkeypatch, capsys):
    """The section's commands one after the other, with a model of a moment on the samples, without a GPU."""
    monkeypatch.chdir(tmp_path)
    examples = Path(zoo_audio.__file__).parent / "examples"
    lines = (examples / "transcripts.tsv").read_text().splitlines()
    rows = [dict(zip(("audio", "text"), line.split("\t"), strict=True)) for line in lines]
    for row in rows:
        (tmp_path / row["audio"]).symlink_to(examples / row["audio"])
    (tmp_path / "talk.wav").symlink_to(examples / "sample_1.wav")
    Path("recordings.tsv").write_text("\n".join(lines))
    Path("others.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    page = PAGES["docs"].read_text(encoding="utf-8")
    (section,) = re.findall(r"\n## Train on your own data\n(.*?)\n## ", page, re.DOTALL)
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for folder in ("piano", "others"):
        Path(folder).mkdir()
        (tmp_path / folder / "note.wav").symlink_to(examples / "pluck.wav")
        (tmp_path / folder / "pluck.wav").symlink_to(examples / "pluck.wav")
    layer = json.dumps({"mode": "nplr", "d_state": 8, "n_ssm": 1, "dt_transform": "softplus"})
    sizes = {
        "train-speech": ["dim=16", "n_enc=1", "n_dec=1", "n_mels=20"],
        "train-audio": ["d_model=8", "n_layers=1", "sample_rate=8000", f"layer={layer}"],
    }
    for command in "".join(blocks).splitlines():
        shorter = command.replace("--device cuda", "").replace("65536", "256").replace("seconds 2", "seconds .01")
        words = shlex.split(shorter)[1:]
        if words[0] in sizes:
            words += ["--steps", "1", *(w for size in sizes[words[0]] for w in ("--set", size))]
        assert run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "try: zoo transcribe ./asr recording.wav" in said
    assert "WER" in said
    assert "bits per sample" in said
    assert Path("made.wav").is_file()
