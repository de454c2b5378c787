"""Pictures, arrays and tables to the classes of sequence models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo import errors
from zoo.cli import run
from zoo.pipelines import Failure
from zoo.tasks.sequence_files import read_sequence

Image = pytest.importorskip("PIL.Image")
PAGE = Path(__file__).parents[2] / "docs" / "sequences.md"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def tiny(name, **overrides):
    return zoo.testing.case(name).build(**overrides).eval()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("s4_scifar", [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
        ("s4d_scifar", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        ("s4_lra_cifar", [122.6 / 255], [61 / 255]),
        ("s4_lra_pathx", [0.5], [0.5]),
    ],
)
def test_pixels_are_the_originals(name, mean, std, photo):
    """Row by row, normalised as the original's data loaders do: written out here from their definition."""
    side = 128 if name == "s4_lra_pathx" else 32
    image = Image.open(photo).resize((side, side), Image.Resampling.NEAREST)
    image.save(photo)
    values = np.asarray(image.convert("L") if len(mean) == 1 else image, dtype=np.float64) / 255
    expected = (values.reshape(side * side, len(mean)) - mean) / std
    pipe = zoo.pipeline(tiny(name))
    found = pipe.prepare(pipe.read(photo))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    answer = pipe(photo)
    logits = pipe.model(torch.from_numpy(expected).float()[None])[0]
    assert answer.length == side * side
    assert answer.confidence == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    assert answer.indices[0] == logits.argmax().item()
    names = CIFAR if name != "s4_lra_pathx" else ["not connected", "connected"]
    assert answer.label == names[answer.indices[0]]
    assert answer.to_dict()["answer"] == answer.label


def test_pictures_of_other_sizes_and_kinds(photo, tmp_path):
    pipe = zoo.pipeline(tiny("s4_scifar"), top_k=2)
    Image.open(photo).resize((90, 64)).save(tmp_path / "wide.jpg")
    Image.new("RGBA", (40, 40), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    results = pipe(tmp_path, batch_size=3)
    assert [r.source.rpartition("/")[2] for r in results] == ["clear.png", "photo.png", "wide.jpg"]
    assert all(len(r.labels) == 2 and r.length == 1024 for r in results)
    pixels = np.asarray(Image.open(photo))
    assert pipe(pixels).probabilities == pytest.approx(pipe(photo).probabilities)
    assert pipe(Image.open(photo)).label == pipe(photo).label
    white = pipe.prepare(pipe.read(tmp_path / "clear.png"))
    torch.testing.assert_close(white[0], (1 - torch.tensor(pipe.mean)) / torch.tensor(pipe.std))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(errors.BadArgument, match="is not an image that can be read"):
        pipe(tmp_path / "bad.png")
    assert [isinstance(r, Failure) for r in pipe([photo, tmp_path / "bad.png"], keep_going=True)] == [False, True]


def test_other_classes_and_channels(photo):
    """A model for other classes has no CIFAR names; one for grey pictures gets the mean of the card's numbers."""
    assert zoo.pipeline(tiny("s4_scifar", num_classes=4))(photo).label.startswith("class ")
    assert zoo.pipeline(tiny("s4_scifar", num_classes=2), labels=["a", "b"])(photo).label in "ab"
    pipe = zoo.pipeline(tiny("s4_scifar", d_input=1))
    assert pipe.mean == [pytest.approx(np.mean([0.4914, 0.4822, 0.4465]))]
    assert pipe(photo).length == 1024
    pipe = zoo.pipeline(tiny("s4_sequence_classifier"), image_size=[8, 4], mean=[0.1], std=[2.0])
    assert pipe(photo).length == 32
    with pytest.raises(errors.BadArgument, match="mean has 3 numbers; the model has 1 channels"):
        zoo.pipeline(pipe.model, image_size=[8, 4], mean=[0.1, 0.2, 0.3])
    with pytest.raises(errors.BadArgument, match="5 channels, pictures have 1 or 3"):
        zoo.pipeline(tiny("s4_sequence_classifier", d_input=5), image_size=[8, 4])


@pytest.fixture
def signals():
    return np.random.default_rng(1).normal(size=(50, 3)).round(4)


def test_arrays_and_tables_agree(signals, tmp_path):
    model = tiny("s4_sequence_classifier", d_input=3, num_classes=4)
    pipe = zoo.pipeline(model)
    expected = model(torch.from_numpy(signals).float()[None])[0].softmax(-1).max().item()
    np.save(tmp_path / "a.npy", signals)
    rows = [list(map(str, row)) for row in signals]
    (tmp_path / "b.csv").write_text("x,y,z\n" + "\n".join(map(",".join, rows)) + "\n")
    (tmp_path / "c.tsv").write_text("\n".join(map("\t".join, rows)))
    (tmp_path / "d.txt").write_text("# a comment\n" + "\n".join(map("  ".join, rows)))
    (tmp_path / "e.csv").write_text("\ufeffx;y;z\n" + "\n".join(";".join(row).replace(".", ",") for row in rows))
    answers = pipe([tmp_path, signals, torch.from_numpy(signals)], batch_size=2)
    assert len(answers) == 7
    for answer in answers:
        assert answer.confidence == pytest.approx(expected, abs=1e-6)
        assert answer.length == 50
    timed = "\n".join(f"{i / 10},{','.join(row)},note" for i, row in enumerate(rows))
    (tmp_path / "f.csv").write_text("t,x,y,z,remark\n" + timed)
    with pytest.raises(errors.BadArgument, match=r"line 2, column 'remark': 'note' is no number"):
        pipe(tmp_path / "f.csv")


def test_columns(signals, tmp_path):
    (tmp_path / "t.csv").write_text("t,x,y,z\n" + "\n".join(",".join(map(str, [i, *r])) for i, r in enumerate(signals)))
    pipe = zoo.pipeline(tiny("s4_sequence_classifier", d_input=2), columns=["z", 1])
    np.testing.assert_array_equal(pipe.read(tmp_path / "t.csv"), signals[:, [2, 0]])
    with pytest.raises(errors.BadArgument, match="no column 'w'; it has t, x, y, z"):
        read_sequence(tmp_path / "t.csv", ["w"])
    with pytest.raises(errors.BadArgument, match="no column 4; it has t, x, y, z"):
        read_sequence(tmp_path / "t.csv", [4])


def test_lengths_differ_within_a_run(signals):
    pipe = zoo.pipeline(tiny("s4_sequence_classifier", d_input=3))
    answers = pipe([signals, signals[:20], signals[:20]], batch_size=3)
    assert [a.length for a in answers] == [50, 20, 20]
    assert answers[1].probabilities == pytest.approx(pipe(signals[:20]).probabilities, abs=1e-6)


def test_tokens(tmp_path):
    model = tiny("s4_sequence_classifier", d_input=7, vocab=True)
    pipe = zoo.pipeline(model)
    tokens = np.array([0, 6, 3, 3, 1])
    np.save(tmp_path / "t.npy", tokens)
    (tmp_path / "t.csv").write_text("\n".join(map(str, tokens)))
    expected = model(torch.from_numpy(tokens)[None])[0].softmax(-1).max().item()
    assert [a.confidence for a in pipe([tmp_path, tokens])] == pytest.approx([expected] * 3, abs=1e-6)
    with pytest.raises(errors.BadArgument, match=r"tokens from 0 to 7; .* knows 0 to 6"):
        pipe(np.array([0, 7]))
    with pytest.raises(errors.BadArgument, match="whole numbers"):
        pipe(np.array([0.5, 1]))


def test_mistakes(signals, photo, tmp_path):
    pipe = zoo.pipeline(tiny("s4_sequence_classifier", d_input=3))
    broken = signals.copy()
    broken[7, 1] = np.nan
    with pytest.raises(errors.BadArgument, match=r"nan at position 7, channel 1 \(1 such values of 150"):
        pipe(broken)
    with pytest.raises(errors.BadArgument, match=r"50 channels .*transpose it"):
        pipe(signals.T)
    with pytest.raises(errors.BadArgument, match=r"2 channels .* takes \(length, 3\)"):
        pipe(signals[:, :2])
    with pytest.raises(errors.BadArgument, match=r"shape \(1, 50, 3\); expected \(length, channels\)"):
        pipe(signals[None])
    with pytest.raises(errors.BadArgument, match="is empty"):
        pipe(signals[:0])
    with pytest.raises(errors.BadArgument, match="expected real numbers"):
        pipe(signals.astype(complex))
    with pytest.raises(errors.BadArgument, match="no model of pictures"):
        pipe(photo)
    (tmp_path / "gap.csv").write_text("1,2,3\n4,,6\n")
    with pytest.raises(errors.BadArgument, match="nan at position 1, channel 1"):
        pipe(tmp_path / "gap.csv")
    (tmp_path / "ragged.csv").write_text("1,2,3\n4,5\n")
    with pytest.raises(errors.BadArgument, match="line 2: 2 columns; the first line has 3"):
        pipe(tmp_path / "ragged.csv")
    (tmp_path / "void.csv").write_text("\n")
    with pytest.raises(errors.BadArgument, match="is empty; expected a table"):
        pipe(tmp_path / "void.csv")
    (tmp_path / "no.npy").write_bytes(b"123")
    with pytest.raises(errors.BadFile, match=r"no \.npz or \.npy file"):
        pipe(tmp_path / "no.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    with pytest.raises(errors.BadArgument, match=r"archive of arrays \(a, b\)"):
        pipe(tmp_path / "two.npy")
    with pytest.raises(errors.BadArgument, match=r"50 positions; .* 32 x 32 pixels, so 1024"):
        zoo.pipeline(tiny("s4_scifar"))(signals)
    with pytest.raises(errors.BadArgument, match="top_k is 0"):
        zoo.pipeline(tiny("s4_scifar"), top_k=0)
    with pytest.raises(errors.BadArgument, match="pairs of documents"):
        zoo.pipeline(tiny("s4_sequence_classifier", retrieval=True))
    with pytest.raises(errors.BadArgument, match="num_classes=0"):
        zoo.pipeline(tiny("s4_sequence_classifier", num_classes=0))


def test_a_checkpoint_of_ones_own_on_the_command_line(photo, tmp_path, capsys):
    config = {"d_model": 8, "n_layers": 1, "layer": {"mode": "s4d", "init": "diag-lin", "d_state": 4}}
    zoo.save(zoo.create("s4d_scifar", **config), tmp_path / "mine")
    assert run(["predict", str(tmp_path / "mine"), str(photo), "--json", "-o", "top_k=3"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["answer"] in CIFAR
    assert len(answer["labels"]) == 3


def test_the_documentation_runs(tmp_path, monkeypatch, photo, signals):
    """Every Python line of the page, on files of the names that it uses."""
    monkeypatch.chdir(tmp_path)
    Image.open(photo).save("ship.png")
    np.save("walk.npy", signals)
    (tmp_path / "run.csv").write_text("t,ax,ay,az\n" + "\n".join(",".join(map(str, [0, *r])) for r in signals))
    (tmp_path / "wiki.train.tokens").write_text(" the cat \n the dog \n")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert names["answer"].label in ("walking", "running")
    assert (tmp_path / "wt103.vocab").read_text().split() == ["<eos>", "the", "cat", "dog"]
