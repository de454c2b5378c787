"""A file in, actions out: the pipeline, the validator and the commands agree with the running agent."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
import zoo_rl
from zoo_rl import envs
from zoo_rl.commands import act, play
from zoo_rl.decision_mamba import DecisionMamba
from zoo_rl.pipelines import Policy
from zoo_rl.s5_rl import S5ActorCritic


def critic(**more):
    torch.manual_seed(0)
    return S5ActorCritic(
        9, 4, d_model=16, ssm_size=16, n_layers=1, encoder_dim=8, body_dim=8, C_init="trunc_standard_normal", **more
    )


def recorded(agent, env, steps):
    """A running agent, and the file of what it did."""
    rows = {k: [] for k in ("observations", "actions", "rewards", "terminals")}
    seen, reward, done = env.reset(), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    for _ in range(steps):
        before, action = seen, agent.act(seen, reward, done)
        seen, reward, done = env.step(action)
        for name, value in zip(rows, (before, action, reward, done), strict=True):
            rows[name].append(value[0].numpy())
    return {k: np.stack(v) for k, v in rows.items()}


def test_the_file_of_a_run_gives_its_actions():
    model = critic()
    arrays = recorded(zoo_rl.agent(model, 1, greedy=True), envs.RepeatPrevious(1, seed=3), 120)
    answer = Policy(model)(arrays)
    assert answer.agreement == 1
    assert answer.actions.tolist() == arrays["actions"].tolist()
    assert answer.episodes == 3
    assert answer.values.shape == (120,)
    assert "120 actions, 3 episodes, 100.0% as recorded" in str(answer)
    # with the last action and the flag in the file, the same
    first = np.r_[True, arrays["terminals"][:-1]]
    obs = envs.extended(
        torch.from_numpy(arrays["observations"]), torch.from_numpy(np.r_[0, arrays["actions"][:-1]]), 4,
        torch.from_numpy(first),
    )  # fmt: skip
    again = Policy(model)({**arrays, "observations": obs.numpy()})
    assert again.actions.tolist() == answer.actions.tolist()


@pytest.mark.parametrize("fine", ["tiled", "causal"])
def test_the_file_of_a_decision_makers_run(fine):
    torch.manual_seed(0)
    model = DecisionMamba(4, 2, 16, 2, 5, 8, d_state=4, fine=fine)
    settings = {"scale": 5.0, "state_mean": np.full(4, 0.1), "state_std": np.full(4, 0.7), "target_return": 9.0}
    arrays = recorded(zoo_rl.agent(model, 1, **settings), envs.Glide(1, max_steps=7, seed=2), 14)
    assert arrays["terminals"].sum() == 2
    answer = Policy(model, **settings)(arrays)
    assert answer.error < 1e-9
    np.testing.assert_allclose(answer.actions, arrays["actions"], atol=1e-4)
    assert answer.episodes == 2
    # without a target each step's own return-to-go counts, and what is assumed is said
    own = Policy(model)(arrays)
    assert own.error > 1e-4
    assert "no scale given" in own.notes
    assert "file's own mean" in own.notes


def test_several_files_and_failures(tmp_path):
    model = critic()
    arrays = recorded(zoo_rl.agent(model, 1), envs.RepeatPrevious(1), 60)
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **{k: v[:30] for k, v in arrays.items()})
    np.savez(tmp_path / "c.npz", **{**arrays, "actions": arrays["actions"] + 4})
    found = Policy(model)(tmp_path, keep_going=True)
    assert [len(f.actions) for f in found[:2]] == [60, 30]
    assert "expected 0 to 3" in found[2].summary()
    with pytest.raises(ValueError, match="observations have 3 numbers; the model takes 9 or 4"):
        Policy(model)({"observations": np.zeros((2, 3)), "actions": np.zeros(2, int)})
    answer = Policy(model)(tmp_path / "a.npz")
    saved = np.load(answer.save(tmp_path / "out.npz"))
    assert saved["actions"].tolist() == answer.actions.tolist()


def test_validation(tmp_path):
    model = critic()
    arrays = recorded(zoo_rl.agent(model, 1, seed=1), envs.RepeatPrevious(1), 60)
    np.savez(tmp_path / "a.npz", **arrays)
    found = zoo.validate(model, tmp_path / "a.npz", "policy")
    answer = Policy(model)(tmp_path / "a.npz")
    assert found.samples == 60
    assert found.metrics == {"accuracy": pytest.approx(answer.agreement), "nll": pytest.approx(-answer.log_prob)}
    torch.manual_seed(0)
    policy = DecisionMamba(4, 2, 16, 1, 5, 8, d_state=4)
    glide = recorded(zoo_rl.agent(policy, 1, target_return=1.0), envs.Glide(1, max_steps=7), 14)
    np.savez(tmp_path / "g.npz", **glide)
    found = zoo.validate(policy, tmp_path / "g.npz", "policy", scale=2.0)
    assert set(found.metrics) == {"mse", "mae"}
    assert found.metrics["mae"] ** 2 <= found.metrics["mse"] * 1.0001


def test_continuous_actor_critics_have_a_density():
    torch.manual_seed(0)
    model = S5ActorCritic(7, 2, True, d_model=8, ssm_size=8, n_layers=1, encoder_dim=8, body_dim=8)
    arrays = recorded(zoo_rl.agent(model, 1, greedy=True), envs.Glide(1, max_steps=6), 12)
    answer = Policy(model)(arrays)
    assert answer.error < 1e-9
    assert answer.log_prob == pytest.approx(-np.log(2 * np.pi), abs=1e-4)  # at the mean of two deviations of 1


def test_act(tmp_path):
    runner = CliRunner()
    model = zoo.create("s5_micro")
    zoo.save(model, tmp_path / "model")
    np.savez(tmp_path / "a.npz", **recorded(zoo_rl.agent(model, 1), envs.RepeatPrevious(1), 60))
    where = str((tmp_path / "model").resolve())
    done = runner.invoke(act, [where, str(tmp_path / "a.npz")], catch_exceptions=False)
    assert "60 actions, 2 episodes" in done.output
    done = runner.invoke(act, [where, str(tmp_path / "a.npz"), "--json"], catch_exceptions=False)
    assert len(json.loads(done.output)["actions"]) == 60
    done = runner.invoke(
        act, [where, str(tmp_path / "a.npz"), "--out", str(tmp_path / "o.npz")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert np.load(tmp_path / "o.npz")["actions"].shape == (60,)
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "o.npz")
    with pytest.raises(zoo.errors.StoreError, match="is a file"):  # before a model is looked for
        runner.invoke(act, ["no_such_model", str(tmp_path / "a.npz"), "--out", nowhere], catch_exceptions=False)


def test_play(tmp_path):
    runner = CliRunner()
    zoo.save(zoo.create("s5_micro"), tmp_path / "model")
    where = str((tmp_path / "model").resolve())
    options = ["--episodes", "4", "--envs", "2", "--json"]
    done = runner.invoke(play, [where, "repeat-previous", *options], catch_exceptions=False)
    found = json.loads(done.output)
    assert found["episodes"] == 4
    assert -1 <= found["return"] <= 1
    done = runner.invoke(play, [where, "glide", *options])
    assert "glide has observations of 4 numbers and 2 actions" in done.output
    assert done.exit_code == 2


def test_no_policy():
    with pytest.raises(ValueError, match="Linear is no policy"):
        Policy(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="belong together"):
        Policy(DecisionMamba(4, 2, 16, 1, 5, 8, d_state=4), state_mean=[0.0] * 4)


def decisions(fine="causal"):
    torch.manual_seed(0)
    return DecisionMamba(4, 2, 16, 2, 5, 8, d_state=4, fine=fine)


@pytest.mark.parametrize("fine", ["tiled", "causal"])
def test_many_episodes_at_a_time_are_as_one(fine, monkeypatch):
    """Steps go through in pieces; where pieces end changes nothing. Files of a batch are answered as alone."""
    model = decisions(fine)
    arrays = recorded(zoo_rl.agent(model, 1, target_return=1.0), envs.Glide(1, max_steps=3), 20)
    pipe = Policy(model)
    whole = pipe(arrays)
    monkeypatch.setattr("zoo_rl.pipelines.CHUNK", 2)
    np.testing.assert_allclose(pipe(arrays).actions, whole.actions, atol=1e-6)
    for answer in pipe([arrays, arrays], batch_size=2):
        np.testing.assert_allclose(answer.actions, whole.actions, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_return": float("nan")}, "target_return is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"state_mean": 0.0, "state_std": [1.0, 1.0, 0.0, 1.0]}, "not positive"),
        ({"state_mean": [0.0] * 3, "state_std": [1.0] * 3}, r"state_mean has shape \(3,\)"),
        ({"state_mean": "x", "state_std": 1.0}, "state_mean is 'x'"),
    ],
)
def test_settings_that_would_give_no_numbers(options, match):
    with pytest.raises(zoo.errors.BadArgument, match=match):
        Policy(decisions(), **options)


def test_actions_lie_where_an_agents_do(monkeypatch):
    model = decisions()
    arrays = recorded(zoo_rl.agent(model, 1, target_return=1.0), envs.Glide(1, max_steps=7), 14)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *x: {"actions": forward(*x)["actions"] + 5})
    assert Policy(model)(arrays).actions.max() == 1


def test_actions_are_written_whole(tmp_path):
    answer = Policy(critic())(recorded(zoo_rl.agent(critic(), 1), envs.RepeatPrevious(1), 12))
    assert answer.save(tmp_path / "new" / "acts") == tmp_path / "new" / "acts.npz"
    assert np.load(tmp_path / "new" / "acts.npz")["actions"].shape == (12,)
    with pytest.raises(ValueError, match=r"expected \.npz"):
        answer.save(tmp_path / "acts.csv")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["acts.npz"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["s5_micro", "repeat-previous", "--target-return", "5"], "for Decision Mamba"),
        (["decision_mamba_micro", "glide", "--draw"], "gives one action"),
        (["s5_micro", "checkers"], "no environment 'checkers'"),
        (["s5_micro", "glide"], "2 actions"),
    ],
)
def test_play_says_what_does_not_fit(words, match):
    done = CliRunner().invoke(play, words)
    assert done.exit_code
    assert match in done.output + str(done.exception)


def test_policies_of_the_other_kind_do_not_play():
    pytest.importorskip("gymnasium")
    for name, match in (("gym:CartPole-v1", "are one of several; those of"), ("gym:Nope-v0", "gymnasium has no")):
        done = CliRunner().invoke(play, ["decision_mamba_micro", name, "--episodes", "1"])
        assert match in done.output + str(done.exception)
