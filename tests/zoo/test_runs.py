"""Runs on disk: what goes on after an interruption equals what was never interrupted; everything else is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import zoo
from zoo.cli import output, training
from zoo.layers import S4Block
from zoo.runs import Run, seeded


class Interrupted(KeyboardInterrupt):
    pass


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))


def train(model, steps, run=None, stop=None, optimiser="adamw"):
    """A loop with everything that can have a state."""
    torch.manual_seed(0)
    run = run or Run()
    r, generator = np.random.default_rng(1), torch.Generator().manual_seed(2)
    kinds = {"adamw": torch.optim.AdamW, "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)}
    optimizer = kinds[optimiser](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    began = run.start(model=model, optimizer=optimizer, schedule=schedule, r=r, generator=generator)
    losses, best = began.get("losses", []), began.get("best")
    model.train()
    for step in range(len(losses), steps):
        if step == stop:
            raise Interrupted
        x = torch.from_numpy(r.normal(size=(8, 4)).astype(np.float32)) + torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if losses[-1] == min(losses):
            best = {k: v.clone() for k, v in model.state_dict().items()}
        run.keep(step + 1, losses=losses, best=best)
    return losses, best


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 7, 99])
def test_an_interrupted_run_ends_as_if_it_had_not_been(stop, optimiser, tmp_path):
    whole = network()
    losses, best = train(whole, 100, optimiser=optimiser)
    path = tmp_path / "new" / "training.run"
    with pytest.raises(Interrupted):
        train(network(), 100, Run(path, every=0), stop, optimiser)
    again = network()
    told: list[int] = []
    torch.rand(5)  # what the caller's random numbers were does not matter
    run = Run(path, every=0, on_resume=told.append)
    found, kept = train(again, 100, run, optimiser=optimiser)
    assert told == [stop]
    assert run.begun == stop
    assert found == losses
    assert all(torch.equal(kept[k], v) for k, v in best.items())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    assert run.kept == 100
    run.finish()
    assert list(path.parent.iterdir()) == []
    run.finish()  # a second time does no harm


def test_nothing_is_kept_without_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(network(), 5)
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_once_in_a_while(tmp_path, monkeypatch):
    from zoo import runs

    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    run = Run(tmp_path / "training.run")
    run.start(model=network())
    written: list[int] = []

    def write(done):
        written.append(done)
        now[0] += 5.0

    monkeypatch.setattr(run, "write", write)
    for step in range(1, 301):
        now[0] += 1.0
        run.keep(step)
    assert written == [60, 160, 260]  # after a minute, then twenty times the five seconds that it took


def test_a_file_executes_nothing_and_names_what_it_depends_on(tmp_path):
    path = tmp_path / "training.run"
    with pytest.raises(Interrupted):
        train(network(), 9, Run(path, {"rate": 1e-3, "folder": Path("a")}, every=0), 4)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["about"]) == {"rate": 1e-3, "folder": "a"}
    train(network(), 9, Run(path, {"rate": 1e-3, "folder": "a"}))
    with pytest.raises(zoo.errors.BadFile, match=r"other|interrupted run with rate 0.001 \(now 0.002\)"):
        train(network(), 9, Run(path, {"rate": 2e-3, "folder": "a"}))
    with pytest.raises(zoo.errors.BadFile, match="another model"):
        train(nn.Linear(4, 1), 9, Run(path, {"rate": 1e-3, "folder": "a"}))


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\3\4", None])
def test_damaged_files_are_refused(content, tmp_path):
    path = tmp_path / "training.run"
    if content is None:
        save_file({"weight": torch.zeros(3)}, path)  # a checkpoint, not a run
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(zoo.errors.BadFile, match="no run that can be gone on with"):
        train(network(), 9, Run(path))
    assert path.read_bytes() == before


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    from zoo import runs

    path = tmp_path / "training.run"
    with pytest.raises(Interrupted):
        train(network(), 9, Run(path, every=0), 4)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        losses, _ = train(network(), 9, Run(path, every=0))
    assert len(losses) == 9
    assert "no space left" in caplog.text
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["training.run"]


def test_a_run_of_more_gpus_goes_on_with_fewer(tmp_path, monkeypatch):
    """Each GPU that is there takes up its own random state; those of the others are passed over."""
    states = [torch.full((4,), i, dtype=torch.uint8) for i in range(3)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    run = Run(tmp_path / "run", every=0)
    run.start()
    run.keep(1)
    taken = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: taken.update({device: int(state[0])}))
    again = Run(tmp_path / "run")
    again.start()
    assert (again.begun, taken) == (1, {0: 0, 1: 1})


def test_seeded_numbers_leave_the_callers_alone():
    torch.manual_seed(5)
    torch.rand(2)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(2)
    found = []
    for _ in range(2):
        with seeded(1, torch.device("cpu")):
            found.append(torch.rand(4))
    assert torch.equal(*found)
    with pytest.raises(KeyError), seeded(1, torch.device("cpu")):
        raise KeyError
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_kept_is_named(tmp_path):
    run = Run(tmp_path / "training.run")
    run.start()
    with pytest.raises(TypeError, match=r"run.facts.a\[0\] is a object"):
        run.write(1, a=[object()])
    value: dict[str, Any] = {
        "a": (1, 2.5, None, "x", True),
        "b": {3: [1.0] * 100},
        "c": np.arange(3),
        "d": -float("inf"),
    }
    run.write(1, **value)
    found = Run(tmp_path / "training.run").start()
    assert found["a"] == value["a"]
    assert found["b"] == value["b"]
    assert found["d"] == value["d"]
    assert np.array_equal(found["c"], value["c"])


def test_tied_weights_and_s4_kernels(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"s4": S4Block(4, mode="dplr", d_state=8, l_max=12), "a": nn.Linear(4, 4)})
        model["b"] = nn.Linear(4, 4)
        model["b"].weight = model["a"].weight
        return model

    trained = make().train()
    trained["s4"](torch.randn(1, 12, 4))  # transforms C and sets l_kernel
    run = Run(tmp_path / "training.run")
    run.start(model=trained)
    run.write(1)
    other = make().train()
    Run(tmp_path / "training.run").start(model=other)
    assert int(other["s4"].layer.kernel.l_kernel) == 12
    x = torch.randn(1, 12, 4)
    assert torch.equal(other.eval()["s4"](x), trained.eval()["s4"](x))


# -- on the command line -----------------------------------------------------------------------------------------------


@click.command(name="train-toy")
@click.argument("folder", type=click.Path(path_type=Path))
@training.out
@training.rate(1e-3)
@click.option("--stop", type=int, expose_value=False, callback=lambda ctx, _, value: ctx.meta.update(stop=value))
@training.resume
@output.as_json
def toy(folder, out, rate, resume, as_json):
    model = network()
    with training.run(out, resume, quiet=as_json, samples=8) as run:
        run.every = 0
        losses, _ = train(model, 9, run, click.get_current_context().meta["stop"])
    click.echo(f"{len(losses)} losses")


def test_the_same_command_goes_on(tmp_path):
    place = tmp_path / "out"

    def call(*arguments):
        return CliRunner().invoke(toy, ["data", "--out", str(place), *arguments])

    stopped = call("--stop", "5")
    assert stopped.exit_code == 1
    assert f"stopped; {place} holds the run up to step 5: the same command goes on there" in stopped.output
    assert (place / training.RUN).is_file()
    other = call("--rate", "0.1")
    assert isinstance(other.exception, zoo.errors.BadFile)
    assert "rate 0.001 (now 0.1)" in str(other.exception)
    assert (place / training.RUN).is_file()
    assert call("--stop", "7", "--json").stdout == ""
    ended = call()
    assert ended.output.splitlines() == ["going on after step 7 of an interrupted run", "9 losses"]
    assert not (place / training.RUN).exists()
    call("--stop", "5")
    assert call("--anew").output.splitlines() == ["9 losses"]
