"""The demo of touch answers from a recording, on the command line too, and its card's figures hold."""

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
from zoo_neuro.tactile.commands import pretrain_touch, touch_activity, train_touch
from zoo_neuro.tactile.pipelines import activity, save_activity
from zoo_neuro.tactile.recordings import Layout, read_folder, read_recording, read_splits

DEMO = Path(zoo_neuro.__file__).parent / "demo"
SAMPLE = DEMO / "whisker_sweep.npz"
ROOT = Path(__file__).parents[2]
MODEL = "tactile_micro.solids"


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(MODEL)


def test_sample(pipe):
    answer = pipe(SAMPLE)
    assert answer.label == answer.truth == "ring"
    assert next(iter(answer.shares)) == "ring"
    assert answer.confidence == max(answer.shares.values())
    assert answer.windows == [(0, "ring", pytest.approx(answer.confidence))]
    recording, label = read_recording(SAMPLE)
    assert recording.shape == (110, 35, 6)
    assert pipe.names[label] == "ring"


def test_long_recordings(pipe, tmp_path):
    """Window by window, and on average; what is left over is said."""
    recording, _ = read_recording(SAMPLE)
    long = np.concatenate([recording, recording[::-1] * 0.5, recording[:7]])
    np.save(tmp_path / "long.npy", long)
    answer = pipe(tmp_path / "long.npy")
    assert [w[0] for w in answer.windows] == [0, 110]
    assert answer.windows[0][1:] == ("ring", pytest.approx(pipe(SAMPLE).confidence, abs=1e-5))
    assert answer.notes == ["the last 7 samples make no whole window of 110 and were not read"]
    assert answer.truth is None
    rows = answer.save_csv(tmp_path / "long.csv").read_text().splitlines()
    assert rows[0] == "window,first_sample,label,confidence"
    assert len(rows) == 3
    with pytest.raises(ValueError, match="the recording has 50 samples; the model reads 110"):
        pipe(recording[:50])


def test_files(pipe, tmp_path):
    recording, _ = read_recording(SAMPLE)
    expected = pipe(SAMPLE).confidence
    np.savez(tmp_path / "two.npz", first=recording, second=recording * 0)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["sweep"] = recording
        file["label"] = 3
    assert pipe(tmp_path / "a.h5").confidence == pytest.approx(expected, abs=1e-5)
    assert pipe(tmp_path / "a.h5").truth == "ring"
    assert pipe(SAMPLE.read_bytes()).confidence == pytest.approx(expected)
    assert pipe(recording.reshape(110, 5, 7, 6)).confidence == pytest.approx(expected)
    named = zoo.pipeline(MODEL, key="first", top_k=1, labels=list("abcdef"))(tmp_path / "two.npz")
    assert named.shares == {"d": pytest.approx(expected, abs=1e-5)}
    (tmp_path / "broken.npz").write_bytes(b"not an archive")
    (tmp_path / "broken.h5").write_bytes(b"not an archive")
    np.savez(tmp_path / "flat.npz", x=np.zeros(4))
    np.savez(tmp_path / "named.npz", data=recording, label="ring")
    bad = recording.copy()
    bad[3, 4, 5] = np.nan
    for source, message in (
        (tmp_path / "two.npz", r"holds first \(110, 35, 6\), second .* expected an array 'data'"),
        (tmp_path / "broken.npz", r"no \.npz or \.npy file of plain arrays"),
        (None, "a recording is given as NoneType"),
        ({}, "a recording is given as dict"),
        (b"not an archive", r"the bytes is no \.npz or \.npy file of plain arrays"),
        (tmp_path / "named.npz", "label is 'ring'; expected a category's number"),
        (tmp_path / "broken.h5", "cannot be read as HDF5"),
        (tmp_path / "flat.npz", r"holds x \(4,\)"),
        (bad, "1 values that are not finite"),
        (recording[..., :5], r"has shape \(110, 35, 5\)"),
        (recording[:, :30], r"shape \(110, 30, 6\); expected \(samples, 35, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(source)
    with pytest.raises(ValueError, match="there are 2 labels, and the model has 6"):
        zoo.pipeline(MODEL, labels=["a", "b"])
    with pytest.raises(ValueError, match="top_k is 0"):
        zoo.pipeline(MODEL, top_k=0)


def test_activity(pipe, tmp_path):
    """Every node at every step; a stream's features are those of the whole."""
    frames = pipe.prepare(pipe.read(SAMPLE))
    arrays = activity(pipe.model, frames[0])
    assert arrays["conv1"].shape == (11, 16, 4, 6)
    assert arrays["fc5"].shape == arrays["encoder"].shape == arrays["attender"].shape == (11, 32)
    assert np.array_equal(arrays["fc5"], arrays["encoder"])
    assert torch.from_numpy(arrays["logits"]).softmax(0).max() == pytest.approx(pipe(SAMPLE).confidence, abs=1e-5)
    batch = activity(pipe.model, torch.cat([frames, frames * 0]))
    np.testing.assert_allclose(batch["conv3"][0], arrays["conv3"], rtol=1e-4, atol=1e-5)
    save_activity(tmp_path / "a.npz", arrays)
    assert set(np.load(tmp_path / "a.npz").files) == set(arrays)
    with pytest.raises(ValueError, match=r"expected \.npz, \.h5"):
        save_activity(tmp_path / "a.csv", arrays)
    other = zoo.create("tactile_resnet18_mamba", encoder={"name": "resnet18", "width": 4}).eval()
    stages = activity(other, torch.randn(22, 30, 5, 7))
    assert stages["layer2.1"].shape[:2] == (22, 8)


def test_command_line(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    assert said["label"] == "ring"
    out = tmp_path / "activity.h5"
    run = CliRunner().invoke(
        touch_activity, [MODEL, str(SAMPLE), "--out", str(out), "--nodes", "conv2,encoder", "--json"]
    )
    assert json.loads(run.stdout)["arrays"] == {"conv2": [1, 11, 32, 4, 6], "encoder": [1, 11, 32]}
    h5py = pytest.importorskip("h5py")
    with h5py.File(out) as file:
        assert set(file) == {"conv2", "encoder"}
    run = CliRunner().invoke(touch_activity, [MODEL, str(SAMPLE), "--out", str(out), "--nodes", "conv9"])
    assert "expected some of att_mamba_l0" in run.output


def test_training_from_folders(tmp_path, monkeypatch):
    """The commands: train without labels, from it with labels, predict and validate with what was saved."""
    monkeypatch.chdir(tmp_path)
    recipe("neuro", "whisking").write_folder("sweeps", 4, 7)
    small = ["--set", 'encoder={"name": "graph", "widths": [4, 6, 6], "hidden": 8}', "--set", "repr_dim=12",
             "--epochs", "2", "--batch-size", "8", "--optimiser", "adamw"]  # fmt: skip
    run = CliRunner().invoke(
        pretrain_touch, ["tactile_micro", "sweeps", "--out", "pre", "--objective", "autoencoder", *small],
        catch_exceptions=False,
    )  # fmt: skip
    assert "saved to pre" in run.output
    run = CliRunner().invoke(
        train_touch,
        ["tactile_micro", "sweeps", "--out", "trained", "--pretrained", "./pre", "--freeze", "--json", *small],
        catch_exceptions=False,
    )
    found = json.loads(run.output)
    assert found["recordings"] == [20, 2, 2]
    frozen, source = zoo.load("./trained"), zoo.load("./pre")
    key = "encoder.graph.nodes.conv2.pre.conv.weight"
    assert torch.equal(frozen.state_dict()[key], source.state_dict()[key])
    measured = zoo.validate("./trained", "sweeps")
    assert measured.samples == 24
    assert measured.metrics["accuracy"] <= measured.metrics["top5"]
    assert set(measured.per_class) == {"box", "cone", "cylinder", "ring", "sphere", "wedge"}
    assert zoo.pipeline("./trained")("sweeps/box/object_000.npz").truth == "box"
    run = CliRunner().invoke(pretrain_touch, ["tactile_micro", "sweeps", "--out", "x", "--objective", "byol"])
    assert "expected one of simclr, simsiam, autoencoder" in run.output


def test_folders(tmp_path):
    layout = Layout(11, (60, 5, 7))
    for split in ("train", "validate", "test"):
        (tmp_path / split).mkdir()
        for label in (0, 2):
            np.savez(tmp_path / split / f"{label}.npz", data=np.zeros((110, 35, 6)), label=label)
    train, _, test = read_splits(tmp_path, layout)  # the authors' folders: labels in the files
    assert train.classes == ["0", "1", "2"]
    assert test.labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match="labels from 0 to 2; expected 0 to 1"):
        read_folder(tmp_path / "test", layout, ["a", "b"])
    np.save(tmp_path / "test" / "z.npy", np.zeros((110, 35, 6)))
    with pytest.raises(ValueError, match=r"z\.npy has no label"):
        read_folder(tmp_path / "test", layout)
    with pytest.raises(ValueError, match="which is none of a"):
        read_folder(tmp_path, layout, ["a"])
    with pytest.raises(ValueError, match="has 110 samples; expected 220"):
        read_folder(tmp_path / "train", Layout(22, (60, 5, 7)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no recordings"):
        read_folder(tmp_path / "empty", layout)


@pytest.mark.parametrize("page", ["docs/neuro.md", "plugins/neuro/README.md"])
def test_the_snippets_of_touch_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "plugins" / "neuro" / "src" / "zoo_neuro"
    place.mkdir(parents=True)
    (place / "demo").symlink_to(DEMO)
    text = (ROOT / page).read_text(encoding="utf-8")
    own = text[text.index("## Touch") :]
    own = own[: own.find("\n## ", 1)] if "\n## " in own[1:] else own
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", own, re.DOTALL):
        exec(code, names)
    assert "ring" in capsys.readouterr().out
    if page == "docs/neuro.md":
        assert names["model"].num_classes == 10
        assert names["stream"].frames == 11
        assert Path("activity.npz").exists()


@pytest.mark.slow
def test_the_cards_figures_hold():
    """The recipe's test sweeps are generated from a seed, so its figures can be taken again."""
    from zoo_neuro.tactile.training import accuracy

    train = recipe("neuro", "train_touch")
    test = train.recordings(*train.TEST)
    (metric,) = zoo.info(MODEL).weights.metrics
    assert accuracy(zoo.load(MODEL, dtype="float32"), test) == pytest.approx(metric.value, abs=0.003)
