"""The Python of the documentation runs as it is printed."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import zoo_audio

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
