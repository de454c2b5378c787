"""The demo policies answer from their sample files, and their cards' figures hold on other unseen seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo_rl
from zoo_rl import agents, envs

DEMO = Path(zoo_rl.__file__).parent / "demo"


def test_s5_remembers_four_cards():
    model = zoo.load("s5_micro.repeat_previous")
    figure = zoo.info("s5_micro.repeat_previous").weights.metrics[0].value
    found = agents.run(zoo_rl.agent(model, 50, greedy=True), envs.RepeatPrevious(50, seed=123), 100)
    assert float(found.mean()) == pytest.approx(figure, abs=0.01)
    forgets = zoo_rl.agent(model, 50, greedy=True, memoryless=True)
    assert float(agents.run(forgets, envs.RepeatPrevious(50, seed=123), 100).mean()) < 0
    assert float(agents.random_returns(envs.RepeatPrevious(50, seed=123), 100).mean()) == pytest.approx(-0.5, abs=0.1)


def test_decision_mamba_earns_what_it_is_asked_for():
    model = zoo.load("decision_mamba_micro.glide")
    figure = zoo.info("decision_mamba_micro.glide").weights.metrics[0].value
    earned = [
        float(agents.run(zoo_rl.agent(model, 200, target_return=t), envs.Glide(200, seed=123), 200).mean())
        for t in (0.0, 10.0, 24.0)
    ]
    assert earned == sorted(earned)
    assert earned[-1] == pytest.approx(figure, abs=1.0)
    assert float(agents.random_returns(envs.Glide(200, seed=123), 200).mean()) < 0


@pytest.mark.parametrize("name", ["s5_micro.repeat_previous", "decision_mamba_micro.glide"])
def test_the_sample_files(name):
    path = DEMO / f"{name.partition('.')[2]}.npz"
    answer = zoo.pipeline(name)(path)
    assert answer.episodes == 3
    assert len(answer.actions) == len(np.load(path)["actions"])
    if name.startswith("s5"):
        assert answer.agreement == 1  # the file is a run of this policy
        assert not answer.notes
    else:
        assert answer.error < 0.5
        assert not answer.notes  # scale, mean and deviation are on the card
    assert bool(torch.isfinite(torch.from_numpy(np.asarray(answer.actions))).all())
