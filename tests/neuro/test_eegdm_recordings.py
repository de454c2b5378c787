"""Recordings: what is read from files, how it is prepared, where windows lie."""

import numpy as np
import pytest

from zoo_neuro.eegdm.data import read_labelled, split_subjects, subject_of, windows
from zoo_neuro.eegdm.preparation import TCP, Preparation, bipolar, electrode, window_starts
from zoo_neuro.eegdm.recordings import Recording, read_events, read_recording, write_recording
from zoo_neuro.eegdm.signals import SCALE, mu_law

ELECTRODES = ("FP1", "F7", "T3", "T5", "O1", "FP2", "F8", "T4", "T6", "O2")
ELECTRODES += ("A1", "C3", "CZ", "C4", "A2", "F3", "P3", "F4", "P4")
PLAIN = Preparation(
    channels=["FP1-F7", "F7-T3"], sfreq=100, l_freq=None, h_freq=None, notch=None, samples=50, mu_law=False
)


def recording(seconds: float = 4.0, sfreq: float = 100.0, names=ELECTRODES, seed: int = 0) -> Recording:
    r = np.random.default_rng(seed)
    return Recording(r.normal(0, 3e-5, (len(names), round(seconds * sfreq))), sfreq, [f"EEG {n}-REF" for n in names])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("EEG FP1-REF", "FP1"),
        ("EEG Fp1-LE", "FP1"),
        ("Fp1", "FP1"),
        ("T7", "T3"),
        ("P7-T7", "T5-T3"),
        ("T8-P8-0", "T4-T6"),
        ("M1", "A1"),
        ("EEG A1-REF", "A1"),
        ("FZ-CZ", "FZ-CZ"),
    ],
)
def test_electrodes_have_one_spelling(written, meant):
    assert electrode(written) == meant


def test_montage_of_electrodes_and_of_channels_that_are_there():
    one = recording()
    found = bipolar(one, TCP)
    assert found.shape == (22, 400)
    np.testing.assert_array_equal(found[0], one.signal[0] - one.signal[1])
    np.testing.assert_array_equal(found[21], one.signal[18] - one.signal[9])
    ready = Recording(one.signal[:2], 100, ["FP1-F7", "F7-T7"])
    np.testing.assert_array_equal(bipolar(ready, ["F7-T3", "FP1-F7"]), one.signal[[1, 0]])


def test_missing_channels_are_named_or_zero():
    one = recording(names=("FP1", "F7"))
    with pytest.raises(ValueError, match="F7-T3"):
        bipolar(one, ["FP1-F7", "F7-T3"])
    assert not bipolar(one, ["FP1-F7", "F7-T3"], missing="zeros")[1].any()
    with pytest.raises(ValueError, match="has no A1-T3"):
        bipolar(one, ["A1-T3"], missing="zeros")


def test_windows_cover_the_recording_and_wrap_around_its_ends():
    assert window_starts(400, 100, 100) == [0, 100, 200, 300]
    assert window_starts(430, 100, 150) == [0, 150, 300, 330]
    assert window_starts(60, 100, 100) == [0]
    one = recording(1.2)
    x, starts = windows(one, PLAIN)
    assert x.shape == (3, 2, 50)
    assert starts.tolist() == [0.0, 0.5, 0.7]
    pair = ((one.signal[0] - one.signal[1]) * SCALE).astype(np.float32)
    np.testing.assert_allclose(x[2, 0], pair[70:], rtol=1e-6)
    around, _ = windows(one, PLAIN, starts=[-0.1, 1.0])
    np.testing.assert_allclose(around[0, 0], np.r_[pair[-10:], pair[:40]], rtol=1e-6)
    np.testing.assert_allclose(around[1, 0], np.r_[pair[100:], pair[:30]], rtol=1e-6)


def test_short_recordings_repeat_themselves():
    x, _ = windows(recording(0.2), PLAIN)
    np.testing.assert_array_equal(x[0, :, :20], x[0, :, 20:40])


def test_a_file_of_arrays_comes_back(tmp_path):
    one = recording()
    read = read_recording(write_recording(one, tmp_path / "a.npz"))
    assert (read.sfreq, read.channels) == (one.sfreq, one.channels)
    np.testing.assert_allclose(read.signal, one.signal, rtol=1e-6)
    np.save(tmp_path / "b.npy", one.signal * 1e6)
    with pytest.raises(ValueError, match="sfreq and channels"):
        read_recording(tmp_path / "b.npy")
    read = read_recording(tmp_path / "b.npy", sfreq=100, unit="uV", channels=list(one.channels))
    np.testing.assert_allclose(read.signal, one.signal, rtol=1e-9)


@pytest.mark.parametrize(("scale", "unit"), [(1e6, "V"), (1.0, "uV"), (1e3, "V")])
def test_values_in_another_unit_than_was_said(scale, unit, tmp_path):
    """A million times too large they would be noise to every model, a million times too small nothing."""
    one = recording()
    np.savez(tmp_path / "a.npz", signal=one.signal * scale, sfreq=100.0, channels=np.array(one.channels, dtype="S"))
    with pytest.raises(ValueError, match=f"V large if they are {unit}, which no EEG is; say their unit"):
        read_recording(tmp_path / "a.npz", unit=unit)
    right = {1e6: "uV", 1.0: "V", 1e3: "mV"}[scale]
    back = read_recording(tmp_path / "a.npz", unit=right)
    np.testing.assert_allclose(back.signal, one.signal)
    assert back.channels == one.channels  # names kept as bytes too


def test_files_that_are_no_recordings_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="expected one of"):
        read_recording(tmp_path / "a.txt")
    for name in ("none.edf", "none.npz"):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_recording(tmp_path / name)
    (tmp_path / "b.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"no \.npz or \.npy file of plain arrays"):
        read_recording(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="expected 'signal'"):
        read_recording(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="not finite"):
        Recording(np.array([[0.0, np.nan]]), 100, ["FP1"])
    with pytest.raises(ValueError, match="names for 2"):
        Recording(np.zeros((2, 5)), 100, ["FP1"])
    with pytest.raises(ValueError, match=r"\.edf"):
        write_recording(recording(), tmp_path / "a.wav")
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"sfreq": "fast"}, "sfreq has shape .* of <U4; expected numbers"),
        ({"sfreq": [200.0, 200.0]}, r"sfreq has shape \(2,\) of float64"),
        ({"sfreq": np.inf}, "sfreq is inf; expected a positive number"),
        ({"signal": np.ones((2, 9)) * 1j}, "signal has shape .* of complex128"),
        ({"signal": [["a"] * 9] * 2}, "signal has shape .* of <U1"),
    ],
)
def test_arrays_that_are_no_recordings_are_refused(parts, message, tmp_path):
    np.savez(tmp_path / "a.npz", **{"signal": np.ones((2, 9)), "sfreq": 200.0, "channels": ["FP1", "F7"]} | parts)
    with pytest.raises(ValueError, match=message):
        read_recording(tmp_path / "a.npz")


def test_whatever_mne_raises_is_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    mne = pytest.importorskip("mne")
    (tmp_path / "a.edf").write_bytes(b"0")

    def broken(*_, **__):
        raise Exception("Encountered invalid byte")  # as MNE does, of just this class

    monkeypatch.setattr(mne.io, "read_raw", broken)
    with pytest.raises(ValueError, match=r"a\.edf cannot be read as a recording of EEG: Encountered invalid byte"):
        read_recording(tmp_path / "a.edf")


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf])
def test_steps_that_are_none(step):
    with pytest.raises(ValueError, match="expected a positive number"):
        windows(recording(), PLAIN, step=step)


def test_annotations(tmp_path):
    (tmp_path / "a.rec").write_text("3,1.0,2.0,6\n4,2.5,3.5,1\n")
    assert [(e.channel, e.start, e.code) for e in read_events(tmp_path / "a.rec")] == [(3, 1.0, 6), (4, 2.5, 1)]
    (tmp_path / "b.rec").write_text("3,1.0\n")
    with pytest.raises(ValueError, match="line 1"):
        read_events(tmp_path / "b.rec")


def test_labelled_folders(tmp_path):
    for kind in ("calm", "spikes"):
        for who in ("S01", "S02", "S03"):
            (tmp_path / kind).mkdir(exist_ok=True)
            write_recording(recording(1.0, seed=len(who)), tmp_path / kind / f"{who}_{kind}.npz")
    found = read_labelled(tmp_path, PLAIN)
    assert found.classes == ["calm", "spikes"]
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    train, held = split_subjects(found)
    assert len(set(held.subjects)) == 1
    assert not set(held.subjects) & set(train.subjects)
    with pytest.raises(ValueError, match="'calm'"):
        read_labelled(tmp_path, PLAIN, classes=["spikes", "other"])
    with pytest.raises(ValueError, match="two subjects"):
        split_subjects(found.chosen(np.flatnonzero(found.subjects == "S01")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no subfolder"):
        read_labelled(tmp_path / "empty", PLAIN)


def test_annotated_recordings_give_a_window_for_each_event(tmp_path):
    one = recording(6.0)
    write_recording(one, tmp_path / "aaa_1.npz")
    (tmp_path / "aaa_1.rec").write_text("0,2.5,3.5,2\n1,0.5,1.5,6\n")
    found = read_labelled(tmp_path, PLAIN)
    assert found.classes == ["spsw", "gped", "pled", "eyem", "artf", "bckg"]
    assert found.labels.tolist() == [1, 5]
    expected, _ = windows(one, PLAIN, starts=[0.5, -1.5])
    np.testing.assert_allclose(found.x, expected, rtol=1e-5, atol=1e-6)
    assert subject_of(tmp_path / "aaa_1.npz") == "aaa"


class TestWithMNE:
    """The authors' filters, and files of the field."""

    @pytest.fixture(autouse=True)
    def mne(self):
        return pytest.importorskip("mne")

    @pytest.mark.parametrize("ending", ["edf", "bdf"])
    def test_files_of_the_field(self, tmp_path, ending):
        pytest.importorskip("edfio")
        one = recording()
        read = read_recording(write_recording(one, tmp_path / f"a.{ending}"))
        assert (read.sfreq, read.channels) == (100.0, one.channels)
        np.testing.assert_allclose(read.signal, one.signal, atol=5e-9)

    @pytest.mark.parametrize("ending", [".edf", ".bdf"])
    def test_a_file_that_was_cut_short_says_so(self, tmp_path, ending):
        pytest.importorskip("edfio")
        path = write_recording(recording(), tmp_path / f"a{ending}")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=r"ends after 3 of the 4 s that its header says"):
            assert read_recording(path).seconds == 3

    def test_a_damaged_file_says_so(self, tmp_path):
        (tmp_path / "a.edf").write_bytes(b"0       nothing that a recording has")
        with pytest.raises(ValueError, match="cannot be read as a recording"):
            read_recording(tmp_path / "a.edf")

    def test_filtering_is_mnes(self, mne):
        one, p = recording(40.0, 256.0), Preparation()
        raw = mne.io.RawArray(one.signal.copy(), mne.create_info(one.channels, 256.0, "eeg"), verbose="ERROR")
        raw.filter(0.1, 75, verbose="ERROR").notch_filter(50, verbose="ERROR").resample(200, verbose="ERROR")
        x = raw.get_data()  # as the authors: the montage comes last there, which changes nothing
        found, sfreq = p.continuous(one)
        assert sfreq == 200
        np.testing.assert_allclose(found[0], x[0] - x[1], atol=1e-12)
        np.testing.assert_allclose(p.window(found[:, :1000])[3], mu_law_of((x[3] - x[4])[:1000] * 1e4), atol=1e-5)

    def test_windows_by_themselves_as_for_chb_mit(self, mne):
        from scipy import signal

        one = recording(10.0, 256.0)
        p = Preparation(l_freq=0.5, notch=60, per_window=True, samples=2000)
        x, _ = windows(one, p)
        micro = (one.signal[0] - one.signal[1])[None] * 1e6
        y = mne.filter.filter_data(signal.resample(micro, 2000, axis=1), 200, 0.5, 75, verbose="ERROR")
        y = mne.filter.notch_filter(y, 200, 60, verbose="ERROR") / 100
        np.testing.assert_allclose(x[0, 0], mu_law_of(y[0]), atol=1e-5)

    def test_a_rate_that_lacks_the_band_is_refused(self):
        with pytest.raises(ValueError, match="more than 150 Hz"):
            Preparation().continuous(recording(4.0, 100.0))
        with pytest.raises(ValueError, match="expected 200 Hz"):
            Preparation().continuous(recording(4.0, 100.0), filtered=True)

    def test_what_a_reader_should_know(self):
        assert "slow waves" in Preparation().notes(recording(4.0, 200.0))[0]
        assert not Preparation().notes(recording(60.0, 200.0))


def mu_law_of(x: np.ndarray) -> np.ndarray:
    import torch

    return mu_law(torch.from_numpy(np.ascontiguousarray(x))).numpy()
