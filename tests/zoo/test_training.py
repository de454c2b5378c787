"""The training loop that commands share: steps, averages, scores, resuming, several processes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import zoo.testing
from zoo.cli import training
from zoo.training import Place, Settings, Shuffled, fit, held_out, parameter_groups
from zoo_registry import errors, manager

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(seed: int = 0, **kind) -> Net:
    torch.manual_seed(seed)
    return Net(**kind)


def zeros() -> nn.Linear:
    model = nn.Linear(3, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def batches(batch_size: int = 6, seed: int = 0):
    order = Shuffled(len(X), batch_size, seed)
    return lambda index: (X[order(index)], Y[order(index)])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_it_learns():
    model = network()
    found = fit(model, batches(), loss, Settings(steps=300, rate=3e-2, weight_decay=0.0))
    assert len(found.losses) == 300
    assert found.taken_at == 300
    assert not model.training
    with torch.no_grad():
        assert loss(model, (X, Y)) < 0.02 * Y.var()


def test_every_sample_once_an_epoch_in_another_order():
    order = Shuffled(10, 4, seed=3)
    seen = [i for index in range(5) for i in order(index)]  # two epochs
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert order(0) == first[:4]  # asked again, out of turn
    assert Shuffled(10, 4, seed=4)(0) != first[:4]
    assert order.random(2).random() == Shuffled(10, 4, seed=3).random(2).random() != order.random(3).random()
    assert len(set(Shuffled(3, 8, seed=-1)(0))) == 3  # more than there are: every one, then again


def test_held_out_samples_are_a_share_of_each_class():
    classes = ["a"] * 20 + ["b"] * 5 + ["c"] * 2 + ["d"]
    train, rest = held_out(classes, 0.2, seed=1)
    assert sorted(train + rest) == list(range(28))
    assert train == sorted(train)
    assert [classes[i] for i in rest] == ["a"] * 4 + ["b", "c"]  # one of two, and none of one
    assert held_out(classes, 0.2, seed=1) == (train, rest)
    assert held_out(classes, 0.2, seed=2) != (train, rest)
    assert len(held_out([0, 0], 0.99)[0]) == 1
    with pytest.raises(ValueError, match="share is 1"):
        held_out(classes, 1.0)
    with pytest.raises(ValueError, match="of 2 samples none can be held out"):
        held_out([0, 1], 0.5)


def test_the_rate_rises_and_falls():
    settings = Settings(steps=100, rate=1.0, warmup=10, final=0.1)
    rates = [settings.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert Settings(steps=3).rate_at(0) == 1e-3  # no warm-up of less than a step


@pytest.mark.parametrize("kind", [{}, {"average": 0.9}, {"accumulate": 2}, {"precision": "bfloat16"}])
def test_an_interrupted_run_goes_on(tmp_path, kind):
    settings = Settings(steps=6, rate=1e-2, **kind)
    score = lambda model: -float(loss(model, (X, Y)))  # noqa: E731

    def train(run, report):
        model = network(dropout=0.5)
        found = fit(model, batches(), loss, settings, run=run, report=report, score=score, score_every=1)
        model.register_buffer("losses", torch.tensor(found.losses, dtype=torch.float64))
        return model

    zoo.testing.check_resume(train, tmp_path, after=4)


def test_two_halves_of_a_batch_are_one_step():
    """Without batch statistics, gradients of accumulated batches are those of the batch that they make up."""
    whole, parts = zeros(), zeros()
    order = Shuffled(len(X), 8)
    half = lambda index: (X[order(index // 2)].chunk(2)[index % 2], Y[order(index // 2)].chunk(2)[index % 2])  # noqa: E731
    a = fit(whole, batches(8), loss, Settings(steps=5, rate=1e-2))
    b = fit(parts, half, loss, Settings(steps=5, rate=1e-2, accumulate=2))
    zoo.testing.assert_close(parts.weight, whole.weight, tolerance=1e-6, what="weights")
    assert b.losses == pytest.approx(a.losses, rel=1e-6)


def test_the_best_weights_come_out():
    """Scores fall after the second: its weights are what is left."""
    scores = iter([1.0, 5.0, 5.0, 2.0])
    seen: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        assert not model.training
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    model = network()
    found = fit(model, batches(), loss, Settings(steps=7, rate=1e-2), score=score, score_every=2)
    assert found.scores == [(2, 1.0), (4, 5.0), (6, 5.0), (7, 2.0)]
    assert found.taken_at == 4
    assert all(torch.equal(v, seen[1][k]) for k, v in model.state_dict().items())


def test_averaged_weights_come_out():
    model = network()
    settings = Settings(steps=20, rate=0.1, average=0.99)
    fit(model, batches(), loss, settings)
    plain = network()
    fit(plain, batches(), loss, Settings(steps=20, rate=0.1))
    assert not torch.equal(model.layers[0].weight, plain.layers[0].weight)
    assert torch.equal(model.layers[1].running_mean, plain.layers[1].running_mean)


def test_the_callers_random_numbers_go_on():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = network(dropout=0.5)
    torch.manual_seed(5)
    fit(model, batches(), loss, Settings(steps=3))
    assert torch.equal(torch.rand(3), expected)


def test_vectors_and_named_parameters_have_no_decay():
    model = network()
    model.no_weight_decay = lambda: {"layers.3.weight"}
    model.layers[1].requires_grad_(False)
    decayed, free = parameter_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(8, 3)]
    assert decayed["weight_decay"] == 0.1
    assert sorted(p.dim() for p in free["params"]) == [1, 1, 2]
    assert free["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), 0.1)


def test_a_batch_that_cannot_be_made_ends_the_training():
    def batch(index: int):
        if index == 3:
            raise ValueError("picture 7 is damaged")
        return batches()(index)

    before = threading.active_count()
    with pytest.raises(ValueError, match="picture 7 is damaged"):
        fit(network(), batch, loss, Settings(steps=9))
    assert threading.active_count() == before


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(ValueError, match="the loss is nan at step 1; try a smaller rate"):
        fit(network(), lambda index: (X, Y * float("nan")), loss, Settings(steps=3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"average": 1.0}, "average is 1.0"),
        ({"precision": "half"}, "precision is 'half'; expected one of float32, bfloat16"),
    ],
)
def test_settings_are_checked(kind, message):
    with pytest.raises(ValueError, match=message):
        Settings(**kind)
    with pytest.raises(ValueError, match="no sample"):
        Shuffled(0, 4)


def test_recomputing_needs_a_model_that_can():
    with pytest.raises(ValueError, match="Net cannot compute activations again"):
        fit(network(), batches(), loss, Settings(steps=1, recompute=True))
    model = zoo.create("vim_micro", num_classes=3)
    told: list[bool] = []
    model.set_grad_checkpointing = told.append
    x, y = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    fit(model, lambda index: (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1]), Settings(steps=1, recompute=True))
    assert told == [True, False]


# -- what one of several processes runs, after everything above this line

TOGETHER = """
from zoo.runs import Run
from zoo.training import processes

with processes() as place:
    print("only the first speaks", flush=True)
    out = Path(sys.argv[1])
    run = Run(out / "training.run", every=0)
    model = zeros()
    model.left_out = nn.Linear(2, 2)  # which no batch reaches
    found = fit(model, batches(4), loss, Settings(steps=5, rate=1e-2), run=run)
    del model.left_out
    torch.save((model.state_dict(), found.losses), out / f"{place.rank}.pt")
    assert run.kept == (5 if place.first else 0)
    run.finish()
    assert not run.path.exists()
"""


def test_two_processes_train_one_model(tmp_path):
    """Two processes with batches of 4 take the steps that one takes with the same batches, two a step."""
    script = tmp_path / "together.py"
    script.write_text(Path(__file__).read_text().split("# -- what one of several")[0] + TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, script, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("only the first speaks") == 1
    (first, losses), (second, same) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = zeros()
    found = fit(alone, batches(4), loss, Settings(steps=5, rate=1e-2, accumulate=2))
    assert losses == same == pytest.approx(found.losses, rel=1e-6)
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        zoo.testing.assert_close(first[key], value, tolerance=1e-6, what=key)


def test_the_options_of_a_command_on_the_loop(tmp_path):
    @click.command()
    @click.argument("name")
    @training.out
    @training.planned(steps=50, rate=2e-3, batch_size=4, of="Pictures.", share=0.25)
    def command(name, plan):
        plans.append((name, plan))

    plans: list[tuple[str, training.Plan]] = []
    out = tmp_path / "out"

    def given(*words: str) -> training.Plan:
        done = CliRunner().invoke(command, ["a", "--out", str(out), *words])
        assert done.exit_code == 0, done.output
        return plans[-1][1]

    assert given() == training.Plan(
        out=out, share=0.25, validation=None, start=None, arguments={}, settings=Settings(steps=50, rate=2e-3),
        batch_size=4, score_every=None, seed=0, device="cpu", resume=True, as_json=False,
    )  # fmt: skip
    words = ["--average", "0.9", "--warmup", "4", "--precision", "bfloat16", "--recompute", "--seed", "3"]
    assert given(*words).settings == Settings(
        steps=50, rate=2e-3, average=0.9, warmup=4, precision="bfloat16", recompute=True, seed=3
    )
    assert given("--set", "dim=8", "--start", "a.b").arguments == {"dim": 8}
    assert given("--held-out", "0", "--score-every", "3").share == 0
    measured = given("--validation", str(tmp_path))
    assert (measured.share, measured.validation) == (0, tmp_path)
    for wrong, said in (
        (["--average", "1"], "range"),
        (["--held-out", "1"], "range"),
        (["--held-out", "0.5", "--validation", str(tmp_path)], "give one, a share of the data or other data"),
    ):
        done = CliRunner().invoke(command, ["a", "--out", str(out), *wrong])
        assert (done.exit_code, said in done.output) == (2, True), done.output


def test_options_together_keep_their_order():
    @click.command()
    @training.together(click.option("--one"), click.option("--two"))
    def command(**given):
        pass

    assert [option.name for option in command.params] == ["one", "two"]


def test_what_comes_after_the_training_is_the_first_process_s_to_do(monkeypatch):
    @click.command()
    def command():
        with training.processes("cpu"):
            pass
        click.echo("saved")

    assert CliRunner().invoke(command).output == "saved\n"
    second = Place(torch.device("cpu"), rank=1, world=2)
    monkeypatch.setattr("zoo.training.processes", lambda device: contextlib.nullcontext(second))
    done = CliRunner().invoke(command)
    assert (done.output, done.exit_code) == ("", 0)


def test_what_a_training_begins_with():
    model = training.begun("vim_micro", None, 7, num_classes=3)
    again = training.begun("vim_micro", None, 7, num_classes=3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    tuned = training.begun("vim_micro", "vim_micro.digits", 0, num_classes=3)
    assert tuned.head.out_features == 3
    assert next(tuned.parameters()).dtype == torch.float32
    with pytest.raises(errors.BadArgument, match=r"is a vim_micro, and vim_tiny\w* is to be trained"):
        training.begun("vim_tiny_patch16_224", "vim_micro.digits", 0)
    assert training.begun("vim_tiny", None, 0, depth=1).zoo_info.architecture == "vim_tiny_patch16_224"  # a short name
    with pytest.raises(errors.BadArgument, match=r"as vim_micro, and --start vim_micro\.digits"):
        training.begun("vim_micro.digits", None, 0)  # it would have been random weights


def test_a_short_name_begins_with_its_own_weights(tmp_path):
    zoo.save(zoo.create("vim_tiny", depth=1, embed_dim=16), tmp_path / "saved")
    tuned = training.begun("vim_tiny", str(tmp_path / "saved"), 0)
    assert tuned.zoo_info.architecture == "vim_tiny_patch16_224"


PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_page_s_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(snippet, names)
    assert zoo.pipeline("./mine")(torch.ones(1, 32, 32)).label in ("dark", "bright")
    assert not (tmp_path / "mine.run").exists()


def test_the_page_names_every_command_that_trains():
    known = {name for name in manager().commands() if name.startswith(("train", "pretrain"))}
    assert set(re.findall(r"`(?:zoo )?((?:pre)?train(?:-[a-z]+)?)`", PAGE)) == known


def test_a_model_of_another_task_is_refused():
    @click.command("train-pictures")
    @click.argument("name")
    def command(name):
        click.echo(training.check_task(name, "image-classification", "object-detection"))

    assert CliRunner().invoke(command, ["vim_micro"]).output.strip() == "image-classification"
    said = CliRunner().invoke(command, ["mamba_130m"])
    assert said.exit_code == 2
    assert (
        "mamba_130m is for text-generation; zoo train-pictures trains models for image-classification and"
        in said.output
    )
