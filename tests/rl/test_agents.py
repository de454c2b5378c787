"""Agents: what they answer is what the models say of whole trajectories, in constant memory; bad input."""

import numpy as np
import pytest
import torch

import zoo_rl
from zoo_rl import envs
from zoo_rl.agents import DecisionAgent, S5Agent, run
from zoo_rl.decision_mamba import DecisionMamba
from zoo_rl.s5_rl import S5ActorCritic

STEPS = 11


def critic(**more):
    torch.manual_seed(0)
    return S5ActorCritic(
        9, 4, d_model=16, ssm_size=16, n_layers=2, encoder_dim=8, body_dim=8, C_init="trunc_standard_normal", **more
    ).eval()


def decider(fine, **more):
    torch.manual_seed(0)
    return DecisionMamba(5, 3, 16, 2, 6, 40, d_state=4, fine=fine, **more).eval()


def sizes(value):
    if isinstance(value, torch.Tensor):
        return [tuple(value.shape)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [size for item in items for size in sizes(item)]


def test_s5_agent_appends_its_own_last_action():
    model = critic()
    torch.manual_seed(1)
    seen, dones = torch.randn(STEPS, 4), torch.zeros(STEPS, dtype=torch.bool)
    dones[5] = True  # came with the sixth observation
    agent = zoo_rl.agent(model, greedy=True)
    actions = [agent.act(seen[t].numpy(), 0.0, bool(dones[t])) for t in range(STEPS)]
    assert all(type(a) is int for a in actions)
    first = dones.clone()
    first[0] = True
    last = torch.tensor([0, *actions[:-1]])
    obs = envs.extended(seen, last, 4, first)
    with torch.no_grad():
        assert model(obs[None], first[None])["logits"].argmax(-1)[0].tolist() == actions
    # with them in the observation already, the same
    other = S5Agent(model, greedy=True)
    assert [other.act(obs[t], 0.0, dones[t]).item() for t in range(STEPS)] == actions


def test_agents_of_a_batch_are_single_agents():
    model = critic()
    torch.manual_seed(2)
    seen, dones = torch.randn(STEPS, 3, 4), torch.rand(STEPS, 3) < 0.3
    together = S5Agent(model, 3, greedy=True)
    alone = [S5Agent(model, greedy=True) for _ in range(3)]
    for t in range(STEPS):
        actions = together.act(seen[t].numpy(), np.zeros(3), dones[t].numpy())
        assert actions.tolist() == [a.act(seen[t, i].numpy(), 0, dones[t, i]) for i, a in enumerate(alone)]


@pytest.mark.parametrize("fine", ["tiled", "causal"])
def test_decision_agents_act_as_the_whole_history_says(fine):
    model = decider(fine)
    torch.manual_seed(3)
    seen, rewards = torch.randn(STEPS, 5), torch.rand(STEPS)
    mean, std = np.arange(5) / 10, np.full(5, 2.0)
    agent = DecisionAgent(model, target_return=8.0, scale=4.0, state_mean=mean, state_std=std, bounds=None)
    for episode in range(2):  # the second one must know nothing of the first
        found = [
            agent.act(seen[t].numpy(), float(rewards[t]), episode == 1 and t == 0) for t in range(STEPS)
        ]  # reward t came with observation t, for the action before it
        left = 8.0 - torch.cat([torch.zeros(1), rewards[1:]]).cumsum(0)
        states = (seen - torch.tensor(mean, dtype=torch.float32)) / 2
        taken = torch.tensor(np.array(found))
        times = torch.arange(STEPS)
        for t in range(STEPS):
            actions = torch.cat([taken[:t], torch.zeros(1, 3)])
            window = (states[: t + 1], actions, left[: t + 1, None] / 4, times[: t + 1])
            with torch.no_grad():
                if fine == "tiled":
                    wanted = model.get_action(*(x[None] for x in window))[0]
                else:
                    wanted = model(*(x[None] for x in window))["actions"][0, -1]
            torch.testing.assert_close(taken[t], wanted, rtol=1e-4, atol=1e-5)


def test_memory_is_constant():
    agents = {
        "s5": (S5Agent(critic()), 4),
        "causal": (DecisionAgent(decider("causal"), target_return=1.0), 5),
        "tiled": (DecisionAgent(decider("tiled"), target_return=1.0), 5),
    }
    for agent, width in agents.values():
        measured = []
        for _ in range(60):  # beyond the window of 6 steps and the 40 timesteps that have an embedding
            agent.act(np.zeros(width), 0.5)
            measured.append(sizes({k: v for k, v in vars(agent).items() if k != "model"}))
        assert measured[1] == measured[-1]


def test_actions_are_cut_to_the_bounds():
    model = decider("causal")
    with torch.no_grad():
        model.predict_action.fc2.bias.add_(5)
    assert DecisionAgent(model, target_return=1.0).act(np.zeros(5)).tolist() == [1, 1, 1]
    assert DecisionAgent(model, target_return=1.0, bounds=None).act(np.zeros(5)).min() > 1


def test_runs_count_whole_episodes():
    class Zero(S5Agent):
        def _act(self, observation, reward, first):
            return torch.zeros(self.count, dtype=torch.int64)

    env = envs.StatelessCartPole(4, max_steps=500, seed=0)
    found = run(Zero(S5ActorCritic(2, 2, d_model=8, ssm_size=8, n_layers=1), 4), env, 6)
    assert found.shape == (6,)
    assert (found * 500).round().min() >= 8  # a pole that is pushed one way falls after about nine steps
    assert (found * 500).round().max() <= 11
    with pytest.raises(ValueError, match="the agent runs 1 environments"):
        run(S5Agent(critic()), env, 1)


def test_bad_input_changes_nothing():
    agent = S5Agent(critic(), greedy=True)
    with pytest.raises(ValueError, match=r"observation has shape \(5,\); expected \(9,\) or \(4,\)"):
        agent.act(np.zeros(5))
    with pytest.raises(ValueError, match="observation has values that are not finite: 1 of them"):
        agent.act(np.array([0, np.nan, 0, 0]))
    with pytest.raises(ValueError, match="observation is"):
        agent.act("nothing")
    with pytest.raises(ValueError, match="reward has values that are not finite"):
        agent.act(np.zeros(4), float("inf"))
    assert not agent.started
    batch = S5Agent(critic(), 2)
    with pytest.raises(ValueError, match=r"expected \(2, 9\) or \(2, 4\)"):
        batch.act(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"done has shape \(3,\); expected one number, or \(2,\)"):
        batch.act(np.zeros((2, 4)), 0.0, [False] * 3)
    with pytest.raises(ValueError, match="target_return is missing"):
        zoo_rl.agent(decider("tiled"))
    with pytest.raises(ValueError, match="state_std has values that are not positive"):
        DecisionAgent(decider("tiled"), target_return=1.0, state_std=np.zeros(5))
    with pytest.raises(ValueError, match=r"state_mean has shape \(4,\)"):
        DecisionAgent(decider("tiled"), target_return=1.0, state_mean=np.zeros(4))
    with pytest.raises(ValueError, match="scale is 0"):
        DecisionAgent(decider("tiled"), target_return=1.0, scale=0)
    with pytest.raises(ValueError, match="Linear is no policy"):
        zoo_rl.agent(torch.nn.Linear(2, 2))
