"""The demo answers from a recording and draws EEG, on the command line too; its card's figures hold."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from recipes import recipe

import zoo
import zoo_neuro
from zoo.cli.predict import predict as predict_command
from zoo_neuro.eegdm.commands import classify_eeg, generate_eeg, pretrain_eeg, train_eeg
from zoo_neuro.eegdm.recordings import Recording, read_recording, write_recording
from zoo_neuro.eegdm.validation import validate_folder

pytest.importorskip("mne")

ROOT = Path(__file__).parents[2]
SAMPLE = Path(zoo_neuro.__file__).parent / "demo" / "sample.edf"
MODEL, DRAWER = "eegdm_micro.generated", "eegdm_micro_backbone.generated"
PAGES = {"docs": ROOT / "docs" / "neuro.md", "README": ROOT / "plugins" / "neuro" / "README.md"}


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(MODEL)


def test_a_new_head(tmp_path):
    """By reset_classifier and on loading: saved, loaded, and answering without the old names."""
    changed = zoo.load(MODEL)
    changed.reset_classifier(3)
    for model in (changed, zoo.load(MODEL, n_class=3)):
        again = zoo.load(zoo.save(model, tmp_path / "m"))
        assert torch.equal(again.classifier.linear.weight, model.classifier.linear.weight)
        assert zoo.pipeline(again).names == ["0", "1", "2"]


def test_other_inputs_are_refused(pipe):
    for wrong in (None, 3, np.zeros((2, 9)), {}):
        with pytest.raises(ValueError, match="a recording is given as"):
            pipe(wrong)
    draw = zoo.pipeline("eegdm_micro_backbone.generated")
    for wrong in (None, 3, {}, ()):
        with pytest.raises(ValueError, match="channels are given as"):
            draw(wrong)


@pytest.fixture(scope="module")
def eeg():
    return recipe("neuro", "eeg")


def test_sample(pipe, eeg):
    """2.5 s of each kind, one after the other."""
    answer = pipe(SAMPLE)
    assert [w.start for w in answer.windows] == [0.0, 2.5, 5.0, 7.5, 10.0, 12.5]
    assert all(0 < w.confidence <= 1 and w.label == next(iter(w.shares)) for w in answer.windows)
    said = [w.label for w in answer.windows]
    assert sum(a == b for a, b in zip(said, eeg.KINDS, strict=True)) >= 4, said
    assert answer.to_dict()["windows"][0]["label"] == said[0]
    assert answer.picture().size[0] > 1000


def test_what_it_scores_on_new_subjects(pipe, eeg):
    """The card's figure, on fewer windows: of subjects that neither training nor the recipe's test had."""
    card = pipe.info.weights
    figure = {m.name: m.value for m in card.metrics}["accuracy"]
    r = np.random.default_rng(77)
    right = []
    for _ in range(5):
        who = eeg.subject(r)
        for kind in eeg.KINDS:
            answer = pipe(eeg.recording(r, kind, who, 10.0))
            right += [w.label == kind for w in answer.windows]
    assert abs(np.mean(right) - figure) < 0.15, (np.mean(right), figure)


def test_windows_are_answered_alone_as_together(pipe):
    whole = pipe(SAMPLE)
    one = zoo.pipeline(MODEL, windows_per_batch=1)(SAMPLE)
    for a, b in zip(whole.windows, one.windows, strict=True):
        assert (a.label, a.confidence) == (b.label, pytest.approx(b.confidence, abs=1e-5))


def test_predict_and_csv(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    out = tmp_path / "windows.csv"
    run = CliRunner().invoke(classify_eeg, [MODEL, str(SAMPLE), "--out", str(out)], catch_exceptions=False)
    assert run.exit_code == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == len(said["windows"])
    for row, window in zip(rows, said["windows"], strict=True):
        assert row["label"] == window["label"]
        assert float(row["confidence"]) == pytest.approx(window["confidence"], abs=1e-5)


def test_options(pipe, tmp_path):
    one = read_recording(SAMPLE)
    assert len(zoo.pipeline(MODEL, step=0.5, top_k=1)(SAMPLE).windows) == 26
    with pytest.raises(ValueError, match="there are 2 labels"):
        zoo.pipeline(MODEL, labels=["a", "b"])
    lacking = Recording(one.signal[:9], one.sfreq, one.channels[:9])
    with pytest.raises(ValueError, match="T6-O2"):
        pipe(lacking)
    assert len(zoo.pipeline(MODEL, missing="zeros")(lacking).windows) == 6
    np.save(tmp_path / "a.npy", one.signal * 1e6)
    arrays = zoo.pipeline(MODEL, sfreq=100, unit="uV", channels=one.channels)(tmp_path / "a.npy")
    for a, b in zip(arrays.windows, pipe(SAMPLE).windows, strict=True):
        assert a.confidence == pytest.approx(b.confidence, abs=1e-3)
    with pytest.raises(ValueError, match="expected an EEGClassifier"):
        zoo.pipeline(zoo.load(DRAWER), "eeg-classification")


def test_one_logit_is_a_yes_or_no(tmp_path):
    torch.manual_seed(0)
    model = zoo.create("eegdm_micro", n_class=1)
    answer = zoo.pipeline(model, "eeg-classification")(SAMPLE)
    assert {w.label for w in answer.windows} <= {"no", "yes"}
    assert all(sum(w.shares.values()) == pytest.approx(1) and w.confidence >= 0.5 for w in answer.windows)


def test_generation_is_repeatable_and_looks_like_what_was_learned(eeg):
    draw = zoo.pipeline(DRAWER, seed=1)
    first, again, other = draw("all"), draw("all"), zoo.pipeline(DRAWER, seed=2)("all")
    assert first.channels == list(eeg.CHAINS)
    assert np.array_equal(first.recording.signal, again.recording.signal)
    assert not np.array_equal(first.recording.signal, other.recording.signal)
    real = zoo.pipeline(MODEL).read(SAMPLE).x.std() * 100
    assert 0.3 * real < first.microvolts < 3 * real
    # EEG is slow: most of its power lies below 13 Hz; noise has a quarter of it there
    power = np.abs(np.fft.rfft(first.recording.signal, axis=1)) ** 2
    hz = np.fft.rfftfreq(first.recording.signal.shape[1], 0.01)
    assert power[:, (hz > 0) & (hz < 13)].sum() > 0.6 * power[:, hz > 0].sum()


def test_generation_takes_names_and_a_classifier(tmp_path):
    found = zoo.pipeline(zoo.load(MODEL), "eeg-generation", samples=100)("fp1-f7, T8-P8")
    assert found.channels == ["FP1-F7", "T4-T6"]
    assert found.recording.signal.shape == (2, 100)
    with pytest.raises(ValueError, match="'X1-X2' is no channel"):
        zoo.pipeline(DRAWER)("X1-X2")
    out = tmp_path / "drawn.edf"
    run = CliRunner().invoke(
        generate_eeg, [DRAWER, "--channels", "FP1-F7", "--out", str(out), "--json"], catch_exceptions=False
    )
    assert json.loads(run.stdout)["channels"] == ["FP1-F7"]
    assert read_recording(out).channels == ["FP1-F7"]
    picture = tmp_path / "drawn.png"
    CliRunner().invoke(generate_eeg, [DRAWER, "--channels", "FP1-F7", "--out", str(picture)], catch_exceptions=False)
    assert picture.stat().st_size > 1000


def test_training_on_the_command_line(tmp_path, eeg):
    """Pre-train, fine-tune, load, answer, measure: the way of a user's own data."""
    r = np.random.default_rng(5)
    for number in range(3):
        who = eeg.subject(r)
        for kind in ("background", "rhythmic_delta"):
            path = tmp_path / "data" / kind / f"S{number}_{kind}.npz"
            write_recording(eeg.recording(r, kind, who, 5.0), path)
    data, backbone, tuned = str(tmp_path / "data"), str(tmp_path / "backbone"), str(tmp_path / "tuned")
    small = ["--set", "n_layer=1", "--set", "d_model=8"]
    run = CliRunner().invoke(
        pretrain_eeg,
        ["eegdm_micro_backbone", data, "--out", backbone, "--steps", "3", "--batch-size", "4", *small],
        catch_exceptions=False,
    )
    assert "step 3" in run.output
    run = CliRunner().invoke(
        train_eeg,
        ["eegdm_micro", data, "--out", tuned, "--pretrained", backbone, "--epochs", "1", "--json"],
        catch_exceptions=False,
    )
    assert json.loads(run.stdout)["windows"] == [8, 4, 4]
    model = zoo.load(tuned)
    kept = zoo.load(backbone).state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in model.extractor.model.state_dict().items())
    assert {w.label for w in zoo.pipeline(tuned)(SAMPLE).windows} <= {"background", "rhythmic_delta"}
    found = validate_folder(model, data)
    assert found.samples == 12
    assert set(found.per_class) == {"background", "rhythmic_delta"}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "plugins" / "neuro" / "src" / "zoo_neuro"
    place.mkdir(parents=True)
    (place / "demo").symlink_to(SAMPLE.parent)
    text = PAGES[page].read_text(encoding="utf-8").partition("\n## EEG\n")[2]
    names: dict = {"zoo": zoo}
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert codes
    for code in codes:
        exec(code, names)
    assert capsys.readouterr().out
    if page == "docs":
        assert Path("windows.csv").read_text().count("\n") == len(names["answer"].windows) + 1
        assert Path("windows.png").exists()
        assert torch.isfinite(names["loss"])
