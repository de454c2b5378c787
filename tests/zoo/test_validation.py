"""Measuring models on labelled data: the task's function found, its options kept apart from the model's."""

import json

import pytest
import torch

import zoo
from zoo import errors
from zoo.cli import run


@pytest.fixture
def data(tmp_path, toys):
    """Twelve files; the first six carry the label that the model gives them."""
    pipe = zoo.pipeline("toy_small")
    generator = torch.Generator().manual_seed(3)
    for i in range(12):
        text = "\n".join(" ".join(f"{v:.3f}" for v in row) for row in torch.rand(3, 36, generator=generator).tolist())
        file = tmp_path / "unnamed.txt"
        file.write_text(text)
        file.rename(tmp_path / f"{pipe(file).label if i < 6 else 'zebra'}_{i}.txt")
    return tmp_path


def test_a_name_and_a_loaded_model_measure_alike(data):
    found = zoo.validate("toy_small", data)
    assert (found.samples, found.metrics["accuracy"]) == (12, 0.5)
    assert found.model == "toy_small.packed"
    assert found.per_second == 24
    assert zoo.validate(zoo.load("toy_small"), data) == found
    assert "accuracy 0.5" in str(found)
    assert "kappa" not in str(found), "a metric without meaning is not printed as a number"


def test_options_go_where_they_belong(data):
    found = zoo.validate("toy_small", data, limit=3, num_classes=4, dtype=torch.float64)
    assert found.samples == 3
    with pytest.raises(errors.BadArgument, match=r"top_k: no such option; count_right takes limit"):
        zoo.validate(zoo.load("toy_small"), data, top_k=3)


def test_options_of_another_type_are_refused(data, capsys):
    """They reached the validator, whose arithmetic failed on them."""
    assert run(["validate", "toy_small", str(data), "-o", "limit=few"]) == 2
    assert "limit is 'few'; expected int" in capsys.readouterr().err


def test_what_is_missing_is_named(data):
    with pytest.raises(errors.LocalFileMissing, match="nowhere"):
        zoo.validate("toy_small", data / "nowhere")
    with pytest.raises(errors.UnknownTask, match=r"no validator for task 'toy-countin'.*nearest: toy-counting"):
        zoo.validate("toy_small", data, task="toy-countin")


def test_as_typed(data, capsys):
    assert run(["validate", "toy_small", str(data), "--json", "--limit", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == {"accuracy": 0.5, "kappa": None}
    assert found["per_class"].keys() == {"ant"}
    assert run(["validate", "toy_small", str(data)]) == 0
    out = capsys.readouterr().out
    assert "0.5000" in out
    assert "labels are the names" in out
    assert run(["validate", "toy_small"]) == 0, "without data: what they must look like"
    assert "LABEL_anything.txt" in capsys.readouterr().out
    assert run(["validate", "toy_small", str(data), "--workers", "2"]) == 2
    assert "it has limit" in capsys.readouterr().err
    assert run(["validate", "toy_small", str(data / "nowhere")]) == 3
