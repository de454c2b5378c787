"""Recordings as people have them: formats, rates, channels, silence, clipping, 8 bits, damage."""

import numpy as np
import pytest
import soundfile

from zoo_audio.files import EXTENSIONS, Levels, Mono, check_target, open_audio, to_mono, write_audio
from zoo_registry import errors


def tone(seconds, rate, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def loudest(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


@pytest.mark.parametrize(("ending", "rate"), [("wav", 96000), ("flac", 44100), ("ogg", 22050), ("mp3", 48000)])
def test_every_format_and_rate(tmp_path, ending, rate):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.stack([tone(0.5, rate), tone(0.5, rate)], 1), rate)
    audio = open_audio(path)
    assert (audio.rate, audio.channels) == (rate, 2)
    samples, levels = audio.whole(16000)
    assert abs(len(samples) / 16000 - audio.seconds) < 0.01
    assert abs(loudest(samples, 16000) - 440) < 3
    assert 0.4 < levels.peak < 0.6
    assert not levels.notes()


def test_what_lies_above_the_new_band_does_not_fold_back():
    samples, _ = open_audio((tone(0.3, 96000, 30000.0), 96000)).whole(16000)
    assert np.abs(samples[800:-800]).max() < 1e-3


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_every_depth(tmp_path, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.1, 16000), 16000, subtype=subtype)
    samples, _ = open_audio(path).whole(16000)
    assert np.abs(samples - tone(0.1, 16000)).max() < {"PCM_U8": 0.01, "ULAW": 0.02}.get(subtype, 1e-4)


def test_pieces_are_the_whole():
    noise = np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32) * 0.1
    whole, _ = open_audio((noise, 22050)).whole(16000)
    for size in (1, 137, 4999):
        mono = Mono(22050, 16000)
        pieces = [mono.push(noise[i : i + size]) for i in range(0, 5000, size)]
        pieces.append(mono.push(np.zeros(0, np.float32), last=True))
        assert np.allclose(np.concatenate(pieces), whole, atol=1e-6)


def test_channels_are_averaged_and_integers_scaled():
    assert to_mono(np.array([[1.0, 0.0], [0.5, -0.5]])).tolist() == [0.5, 0.0]
    assert to_mono(np.array([0, 128, 255], np.uint8)).tolist() == [-1.0, 0.0, 127 / 128]
    assert to_mono(np.array([-32768, 16384], np.int16)).tolist() == [-1.0, 0.5]


def test_silence_and_clipping_are_noted():
    assert open_audio((np.zeros(800, np.float32), 8000)).whole(8000)[1].notes() == ["silence"]
    assert open_audio((np.zeros(0, np.float32), 8000)).whole(8000)[1].samples == 0
    loud = np.clip(4 * tone(0.1, 8000), -1, 1)
    assert "clipped" in open_audio((loud, 8000)).whole(8000)[1].notes()[0]
    peak = np.zeros(100, np.float32)
    peak[50] = 1.0
    levels = Levels()
    levels.see(peak)
    assert not levels.notes()


def test_clipping_is_counted_across_pieces():
    wave = np.zeros(40, np.float32)
    wave[8:13] = 1
    for cut in range(7, 15):
        levels = Levels()
        levels.see(wave[:cut])
        levels.see(wave[cut:])
        assert levels.clipped == 5, cut


def test_damaged_and_absent_files_say_what_is_wrong(tmp_path):
    with pytest.raises(errors.LocalFileMissing, match="no file"):
        open_audio(tmp_path / "none.wav")
    text = tmp_path / "a.wav"
    text.write_text("this is no audio")
    with pytest.raises(ValueError, match="cannot be read as audio"):
        open_audio(text)
    whole = tmp_path / "b.wav"
    soundfile.write(whole, tone(0.2, 8000), 8000)
    data = whole.read_bytes()
    header = tmp_path / "header.wav"
    header.write_bytes(data[:4] + b"\xff" * 4 + b"XXXX" + data[12:])
    with pytest.raises(ValueError, match="cannot be read as audio"):
        open_audio(header)
    cut = tmp_path / "cut.wav"  # the header promises more than there is: what is there is read
    cut.write_bytes(data[: len(data) // 2])
    assert 0 < len(open_audio(cut).whole(8000)[0]) < 1600
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as audio"):
        open_audio(tmp_path / "empty.wav")


def test_samples_that_cannot_be():
    with pytest.raises(ValueError, match="sampling rate"):
        open_audio(np.zeros(10, np.float32))
    with pytest.raises(ValueError, match="not finite"):
        open_audio((np.array([0.0, np.nan]), 8000)).whole(8000)
    with pytest.raises(ValueError, match="shape"):
        open_audio((np.zeros((2, 2, 2)), 8000))
    with pytest.raises(ValueError, match="sampling rate is 0"):
        open_audio((np.zeros(4), 0)).whole(8000)


def test_writing(tmp_path):
    path = write_audio(tmp_path / "deep" / "a.flac", 2 * tone(0.1, 8000), 8000)
    again, rate = soundfile.read(path)
    assert rate == 8000
    assert np.abs(again).max() > 0.99
    with pytest.raises(ValueError, match="ending"):
        write_audio(tmp_path / "a.xyz", tone(0.1, 8000), 8000)
    assert ".mp3" in EXTENSIONS


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_every_ending_is_written(tmp_path, ending):
    path = write_audio(tmp_path / f"a{ending}", tone(0.2, 16000), 16000)
    assert abs(loudest(open_audio(path).whole(16000)[0], 16000) - 440) < 10


def test_writing_is_refused_before_and_not_halfway(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match="cannot be written"):
        check_target(tmp_path / "file" / "a.wav")
    for wrong in (tone(0.1, 8000)[None], np.array([np.nan], np.float32)):
        with pytest.raises(errors.BadArgument, match="expected"):
            write_audio(tmp_path / "a.wav", wrong, 8000)
    with pytest.raises(errors.StoreError, match="at 11025 samples a second"):  # Opus knows five rates
        write_audio(tmp_path / "a.opus", tone(0.1, 8000), 11025)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_samples_that_would_be_misread():
    with pytest.raises(errors.BadArgument, match="transpose"):  # (channels, samples), as torchaudio has them
        open_audio((np.zeros((2, 16000), np.float32), 16000))
    with pytest.raises(errors.BadArgument, match="transpose"):
        Mono(8000, 16000).push(np.zeros((1, 500), np.float32))
    with pytest.raises(errors.BadArgument, match=r"floats of up to 16383.*32768"):  # 16 bits that nobody scaled
        open_audio((32767 * tone(0.1, 8000), 8000)).whole(8000)
    assert open_audio((10 * tone(0.1, 8000), 8000)).whole(8000)[1].peak > 4  # loud, and read
    with pytest.raises(errors.BadArgument, match="audio is of int64"):  # a list of 16-bit numbers would be silence
        open_audio(([100, -20000, 5], 8000))
    with pytest.raises(errors.BadArgument, match="sampling rate is 'fast'"):
        open_audio((tone(0.1, 8000), "fast"))


def test_a_file_of_samples_that_are_not_finite_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(errors.BadFile, match=r"a\.wav: audio has samples that are not finite"):
        open_audio(tmp_path / "a.wav").whole(8000)
