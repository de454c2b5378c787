"""Emotions of dialogues: files of both formats, scores, training, the demo and its commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from recipes import recipe

import zoo
import zoo.cli
import zoo.testing
import zoo_multimodal
from zoo.cli.predict import predict as predict_command
from zoo_multimodal.broad_mamba import BroadMamba
from zoo_multimodal.commands_emotion import predict_emotions, train_emotions
from zoo_multimodal.dialogues import LABELS, Dialogue, class_names, join, read_dialogues, split
from zoo_multimodal.emotion import EmotionRecognition
from zoo_multimodal.emotion_training import Settings, alone, fit, measure, scores, solve_head

SAMPLE = Path(zoo_multimodal.__file__).parent / "demo" / "moods.npz"
MODEL = "broad_mamba_micro.moods"


@pytest.fixture(scope="module")
def moods():
    return recipe("multimodal", "moods")


def written(form, tmp_path):
    """Two dialogues, of two utterances and one; the second utterance has no audio."""
    text, audio = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[7.0], [np.nan], [8]])
    if form == "npz":
        np.savez(
            tmp_path / "d.npz", text=text, audio=audio, lengths=[2, 1], speaker=["A", "B", "B"], label=["x", "y", "x"]
        )
        return tmp_path / "d.npz"
    utterances = [
        {"text": t, "audio": None if np.isnan(a[0]) else a, "speaker": s, "label": y}
        for t, a, s, y in zip(text.tolist(), audio.tolist(), "ABB", "xyx", strict=True)
    ]
    value = {"dialogues": [{"utterances": utterances[:2]}, {"utterances": utterances[2:]}]}
    (tmp_path / "d.json").write_text(json.dumps(value).replace("NaN", "null"))
    return tmp_path / "d.json"


@pytest.mark.parametrize("form", ["json", "npz"])
def test_formats(form, tmp_path):
    first, second = read_dialogues(written(form, tmp_path))
    assert (first.name, second.name, len(first), len(second)) == ("d1", "d2", 2, 1)
    assert first.speakers == ["A", "B"]
    assert first.labels == ["x", "y"]
    assert first.features["text"].tolist() == [[1, 2], [3, 4]]
    assert first.features["audio"][0] == 7
    assert np.isnan(first.features["audio"][1])
    model = BroadMamba(["x", "y"], {"text": 2, "audio": 1}, dim=8, speakers=2)
    batch = join([first, second], model)
    assert batch.inputs["present"].tolist() == [[[True, True], [True, False]], [[True, True], [False, False]]]
    assert batch.inputs["speaker"].tolist() == [[0, 1], [0, 0]]
    assert batch.inputs["lengths"].tolist() == [2, 1]
    assert batch.labels.tolist() == [[0, 1], [0, -1]]


BAD_JSON = {
    "{": "is no JSON",
    '{"dialogues": []}': "has no dialogues",
    '{"dialogues": null}': "has no dialogues",
    '{"dialogues": "d"}': "has no dialogues",
    '{"utterances": []}': "d1 has no utterances",
    '[{"words": "hi"}]': "d1 has no features",
    '[{"text": [1, 2]}, {"text": [1]}]': r"text has \[1, 2\] numbers",
    '[{"text": ["a"]}]': "text of utterance 1 is no list of numbers",
    '[{"text": [1]}, {"text": null}]': "utterance 2 has no modality at all",
    '[{"text": [1], "label": "x"}, {"text": [1]}]': "utterance 2 has no label",
    '[{"text": [1e999]}]': "text of utterance 1 holds values that are not finite",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json(text, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=BAD_JSON[text]):
        read_dialogues(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pitch": np.ones((2, 2))}, "has no text, audio or visual; it holds pitch"),
        ({"text": np.ones((2, 2)), "audio": np.ones((3, 2))}, r"audio has shape \(3, 2\); expected \(2, features\)"),
        ({"text": np.ones((2, 2)), "lengths": [1, 2]}, "lengths add up to 3; expected positive ones, 2 in all"),
        ({"text": np.ones((2, 2)), "label": ["x"]}, r"label has shape \(1,\); expected \(2,\)"),
        ({"text": np.ones((2, 2)), "name": ["a", "b"]}, "2 names and 1 dialogues"),
        ({"text": np.array([["a"]])}, "text is an array of <U1; expected numbers"),
        ({"text": np.ones((1, 2)), "lengths": ["a"]}, "lengths is an array of <U1; expected numbers"),
        ({"text": np.array([None])}, "no .npz or .npy file of plain arrays"),
        ({"text": np.array([[np.nan, 1.0]])}, "text of utterance 1 holds values that are not finite"),
    ],
)
def test_bad_npz(arrays, said, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        read_dialogues(tmp_path / "d.npz")


def one(labels=("x",), width=2, speakers=None):
    return Dialogue({"text": np.ones((len(labels), width), np.float32)}, speakers, None, list(labels), "d1")


def test_what_does_not_fit_the_model(tmp_path):
    model = BroadMamba(["x", "y"], {"text": 2, "audio": 1}, dim=8, speakers=2)
    for dialogue, said in (
        (one(width=3), "d1: text has 3 numbers; the model reads 2"),
        (one(["z"]), "d1 has the label 'z'; the model knows x, y"),
        (one(["x"] * 3, speakers=["A", "B", "C"]), "d1 has 3 speakers; the model tells 2 apart"),
        (Dialogue({"visual": np.ones((1, 4), np.float32)}, name="d1"), "utterance 1 has none of text, audio"),
    ):
        with pytest.raises(ValueError, match=said):
            join([dialogue], model)
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected one of \.json, \.npz"):
        read_dialogues(tmp_path / "d.txt")
    with pytest.raises(ValueError, match="at least 10 are needed"):
        split([one()] * 9, 0)


def test_label_sets():
    assert class_names([one(["anger", "joy"])]) == ["joy", "anger"]
    assert class_names([one(["sad", "frustrated", "happy"])]) == ["happy", "sad", "frustrated"]
    assert class_names([one(["b", "a"])]) == ["a", "b"]
    assert zoo.create("broad_mamba_meld", device="meta").classes == LABELS["meld"]
    assert zoo.create("broad_mamba_iemocap", device="meta").classes == LABELS["iemocap"]


def test_weighted_f1():
    """By hand: class 0 has F1 2/3 (2 of 4), class 1 1/2 (1 of 4) ..."""
    true, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    found = scores(predicted, true, 4)
    assert found.accuracy == 0.5
    assert found.f1 == pytest.approx([2 / 3, 1 / 2, 0, 0])
    assert found.support == [2, 1, 1, 0]
    assert found.weighted_f1 == pytest.approx((2 * 2 / 3 + 1 / 2) / 4)
    assert scores(true, true, 4).weighted_f1 == 1
    with pytest.raises(ValueError, match="no utterance with a label"):
        scores(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), 2)


def test_training_uses_what_was_said_before():
    """The label of an utterance is what the first one showed: only context can know."""
    r = np.random.default_rng(0)

    def made(i):
        kind = int(r.integers(2))
        x = r.normal(size=(5, 3)).astype(np.float32)
        x[0] += 4 * kind - 2
        return Dialogue({"text": x}, None, None, ["ab"[kind]] * 5, f"d{i}")

    data = [made(i) for i in range(180)]
    torch.manual_seed(0)
    small = {"dim": 8, "scan": {"d_state": 4}, "broad": {"feature_width": 4, "enhancement_width": 4}}
    model = BroadMamba("ab", {"text": 3}, head="broad", **small)
    settings = Settings(epochs=12, batch_size=15, rate=2e-2)
    fit(model, data[:150], data[150:160], settings)
    assert measure(model, data[160:]).weighted_f1 > 0.9
    solve_head(model, data[:150], 1.0)
    assert measure(model, data[160:]).weighted_f1 > 0.9
    blind = BroadMamba("ab", {"text": 3}, **small)
    fit(blind, alone(data[:150]), alone(data[150:160]), Settings(epochs=2, batch_size=75, rate=2e-2))
    assert measure(blind, alone(data[160:])).accuracy < 0.8  # four of five utterances say nothing
    with pytest.raises(ValueError, match="d1 has no labels"):
        fit(model, [Dialogue({"text": np.ones((1, 3), np.float32)}, name="d1")], data[:1], settings)


def test_training_goes_on_after_an_interruption(tmp_path):
    r = np.random.default_rng(0)
    features = [{"text": r.normal(size=(3, 3)).astype(np.float32)} for _ in range(14)]
    data = [Dialogue(one, None, None, list("aba"), f"d{i}") for i, one in enumerate(features)]

    def trained(run, report):
        torch.manual_seed(0)
        model = BroadMamba("ab", {"text": 3}, dim=8, scan={"d_state": 4}, dropout=0.2)
        fit(model, data[:10], data[10:], Settings(epochs=4, batch_size=4), report, run)
        return model

    zoo.testing.check_resume(trained, tmp_path)


# -- the demo


def test_sample():
    pipe = zoo.pipeline(MODEL)
    answer = pipe(SAMPLE)
    dialogues = read_dialogues(SAMPLE)
    assert len(answer.rows) == sum(len(d) for d in dialogues)
    true = [label for d in dialogues for label in d.labels]
    assert np.mean([row["label"] == label for row, label in zip(answer.rows, true, strict=True)]) > 0.6
    for row in answer.rows:
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-4)
    missing = [np.isnan(d.features["audio"][t]).all() for d in dialogues for t in range(len(d))]
    assert all((row["weights"]["audio"] == 0) == gone for row, gone in zip(answer.rows, missing, strict=True))
    alone_ = pipe(dialogues[1])
    rows = [row for row in answer.rows if row["dialogue"] == dialogues[1].name]
    assert [r["label"] for r in alone_.rows] == [r["label"] for r in rows]
    assert [r["confidence"] for r in alone_.rows] == pytest.approx([r["confidence"] for r in rows], abs=1e-5)


def test_commands(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    out = tmp_path / "answers.csv"
    CliRunner().invoke(predict_emotions, [MODEL, str(SAMPLE), "--out", str(out)], catch_exceptions=False)
    rows = list(csv.DictReader(out.open()))
    assert [(r["dialogue"], r["label"]) for r in rows] == [(r["dialogue"], r["label"]) for r in said["rows"]]
    assert {"weight_text", "weight_audio", "weight_visual", "speaker"} <= set(rows[0])


@pytest.mark.parametrize("ridge", [[], ["--ridge", "1.0"]], ids=["trained", "ridge"])
def test_training_from_a_file(ridge, tmp_path, moods, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moods.write("moods.npz", 30, 5)
    arguments = [
        "broad_mamba_micro",
        "moods.npz",
        "--out",
        "trained",
        "--epochs",
        "2",
        "--set",
        "dim=8",
        "--json",
        *ridge,
    ]
    run = CliRunner().invoke(train_emotions, arguments, catch_exceptions=False)
    found = json.loads(run.output)
    assert found["dialogues"] == [24, 3, 3]
    assert 0 < found["weighted F1"] <= 1
    measured = zoo.validate("./trained", "moods.npz")
    assert set(measured.per_class) == set(moods.MOODS)
    assert 0 < measured.metrics["weighted F1"] <= 1
    assert {r["label"] for r in zoo.pipeline("./trained")("moods.npz").rows} <= set(moods.MOODS)


def test_an_interrupted_run_of_other_options_is_refused_as_by_every_command(tmp_path, moods, capsys):
    """A damaged or foreign run is a bad file (status 5), not a wrong option (2)."""
    moods.write(tmp_path / "moods.npz", 30, 5)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "training.run").write_bytes(b"no run")
    words = ["train-emotions", "broad_mamba_micro", str(tmp_path / "moods.npz"), "--out", str(tmp_path / "trained")]
    assert zoo.cli.run([*words, "--epochs", "1", "--set", "dim=8"]) == 5
    assert "--anew" in capsys.readouterr().err


def test_other_inputs_are_refused():
    for wrong in (None, 3, {}, np.zeros(2)):
        with pytest.raises(ValueError, match="dialogues are given as"):
            zoo.pipeline(MODEL)(wrong)


def test_pipeline_takes_broad_mamba_alone():
    with pytest.raises(ValueError, match="Linear is no BroadMamba"):
        EmotionRecognition(torch.nn.Linear(1, 1))


def test_exact_inference_of_the_recipe(moods):
    """Against the sum over all histories of both moods, for a short dialogue."""
    import itertools

    r = np.random.default_rng(3)
    d = moods.dialogue(r, "d")
    d = Dialogue({m: a[:3] for m, a in d.features.items()}, ["A", "B", "A"], None, d.labels[:3], "d")
    n = len(moods.MOODS)

    def shows(t, k):
        p = 1.0
        for m, a in d.features.items():
            if not np.isnan(a[t]).any():
                near, off = (np.exp(-((a[t] - c) ** 2).sum() / 2) for c in (moods.POINTS[m][k], 0))
                p *= 0.65 * near + 0.35 * off
        return p

    def moves(before, after, other):
        return 0.85 * (before == after) + 0.15 * (0.5 * (after == other) + 0.5 / n)

    total = np.zeros((3, n))
    for a0, b0, a1, b1, a2 in itertools.product(range(n), repeat=5):
        p = moves(a0, a1, b0) * moves(b0, b1, a1) * moves(a1, a2, b1) * shows(0, a1) * shows(1, b1) * shows(2, a2)
        for t, k in enumerate((a1, b1, a2)):
            total[t, k] += p
    assert moods.exact(d).tolist() == total.argmax(1).tolist()


@pytest.mark.slow
def test_the_cards_figures_hold():
    found = recipe("multimodal", "train_moods").figures(zoo.load(MODEL).float())
    for metric in zoo.info(MODEL).weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.002)
