"""What the commands that train share: wrong values end them at once, before anything is read or built."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from zoo.cli import output, training


@click.command()
@training.out
@training.steps(40)
@training.batch_size(8, "Dialogues.", least=2)
@training.rate(1e-3)
@training.run_options("dim=64")
@output.as_json
def command(out, choices, as_json, **rest):
    report = training.reporter(rest["steps"], quiet=as_json)
    for step in range(rest["steps"]):
        report(step, float(step))
    click.echo(f"{out.name} {rest}")


def run(*arguments):
    return CliRunner().invoke(command, list(arguments))


def test_defaults_and_help(tmp_path):
    found = run("--out", str(tmp_path / "new"))
    assert found.exit_code == 0
    assert "{'steps': 40, 'batch_size': 8, 'rate': 0.001, 'seed': 0, 'device': 'cpu'}" in found.output
    assert found.output.count("loss") == 20
    assert "step 2 loss 0.5000" in found.output
    assert "loss" not in run("--out", str(tmp_path), "--json").output
    said = " ".join(run("--help").output.split())
    assert "Model argument, as dim=64." in said
    assert "Dialogues. [default: 8; x>=2]" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "nan"], "nan is no rate"),
        (["--rate", "-1"], "-1.0 is no rate"),
        (["--steps", "0"], "not in the range"),
        (["--batch-size", "1"], "not in the range"),
        (["--device", "banana"], "expected cpu, cuda"),
        (["--seed", "x"], "not a valid integer"),
    ],
)
def test_wrong_values(arguments, message, tmp_path):
    found = run("--out", str(tmp_path), *arguments)
    assert found.exit_code == 2
    assert message in found.output


def test_places_that_cannot_hold_the_weights(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "new", "cannot be written")):
        found = run("--out", str(place))
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "said"), [("out", "./out"), ("a/b", "./a/b"), ("/a/b", "/a/b"), ("../x", "../x"), ("a b", "'./a b'")]
)
def test_folders_as_commands_take_them(folder, said):
    assert training.source(Path(folder)) == said


def test_figures():
    rows = training.measured({"accuracy": 0.5}, dataset="d", split="test", command="train-x")
    assert rows == [
        {"name": "accuracy", "value": 0.5, "dataset": "d", "split": "test", "source": "measured by zoo train-x"}
    ]
    here = training.measured({"accuracy": 0.5}, dataset=Path(".").name, split="test", command="train-x")
    assert here[0]["dataset"] == "."  # zoo.save refuses figures of nothing, and that after all of the training
    assert training.said({"a": 0.5, "b": 1.0}) == "a 0.5000, b 1.0000"
