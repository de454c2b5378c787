"""Environments: their rules, their ends, gymnasium's beside ours."""

import numpy as np
import pytest
import torch

import zoo
from zoo_rl import envs


def test_repeat_previous_pays_for_memory():
    env = envs.RepeatPrevious(3, k=4, seed=5)
    seen, total, shown = env.reset(), torch.zeros(3), []
    for t in range(52):
        shown.append(seen.argmax(1))
        action = shown[t - 4] if t >= 4 else torch.zeros(3, dtype=torch.int64)
        seen, reward, done = env.step(action)
        assert bool(reward.any()) == (t >= 4)
        assert bool(done.all()) == bool(done.any()) == (t == 51)
        total += reward
    torch.testing.assert_close(total, torch.ones(3))
    # a deck has thirteen cards of each suit, and the next deck is another
    cards = torch.stack(shown, 1)
    assert all((cards == suit).sum(1).tolist() == [13, 13, 13] for suit in range(4))
    assert not torch.equal(cards, env.deck)


def test_stateless_cartpole_is_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    ours, theirs = envs.StatelessCartPole(1, max_steps=500, seed=3), gymnasium.make("CartPole-v1")
    theirs.reset(seed=0)
    seen = ours.reset()
    theirs.unwrapped.state = ours.state[0].double().numpy()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        action = torch.randint(2, (1,), generator=generator)
        seen, _, done = ours.step(action)
        state, _, ended, _, _ = theirs.step(int(action))
        assert bool(done) == ended
        if ended:
            return
        np.testing.assert_allclose(seen[0].numpy(), state[::2], rtol=1e-4, atol=1e-5)
    raise AssertionError("the pole never fell")


def test_meta_cartpole_keeps_its_map_for_an_episode():
    env = envs.MetaCartPole(2, trials=3, seed=1)
    seen = env.reset()
    assert seen.shape == (2, 7)
    assert seen[:, 6].tolist() == [1, 1]
    first_map, begin = env.map.clone(), env.begin.clone()
    trials = torch.zeros(2, dtype=torch.int64)
    for _ in range(400):
        seen, reward, done = env.step(torch.ones(2, dtype=torch.int64))
        trials += seen[:, 5].long()
        if bool(done[0]):
            break
        if bool(seen[0, 5]):
            assert torch.equal(env.state[0], begin[0])  # every trial begins in the same state
            assert torch.equal(env.map[0], first_map[0])
    assert trials[0] == 2
    assert not torch.equal(env.map[0], first_map[0])
    assert seen[0, 6] == 1
    assert reward[0] == pytest.approx(1 / 600)
    torch.testing.assert_close(env.map @ env.map.transpose(1, 2), 2 * torch.eye(2).expand(2, 2, 2))


def test_the_previous_action_and_the_flag():
    env = envs.PreviousAction(envs.RepeatPrevious(2, seed=0))
    assert env.obs_dim == 9
    seen = env.reset()
    assert seen[:, 4:].tolist() == [[0, 0, 0, 0, 1]] * 2
    for t in range(52):
        seen, _, done = env.step(torch.tensor([1, 3]))
        wanted = [[0, 0, 0, 0, 1]] * 2 if t == 51 else [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
        assert seen[:, 4:].tolist() == wanted
    assert bool(done.all())


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("s5_popgym_repeat_previous", envs.RepeatPrevious),
        ("s5_popgym_cartpole", envs.StatelessCartPole),
        ("s5_popgym_meta_cartpole", envs.MetaCartPole),
        ("s5_micro", envs.RepeatPrevious),
    ],
)
def test_cards_have_the_sizes_of_their_environments(name, env):
    config, wrapped = zoo.info(name).card.config, envs.PreviousAction(env(1))
    assert (config["obs_dim"], config["action_dim"]) == (wrapped.obs_dim, wrapped.action_dim)


def test_glide_rewards_the_goal():
    env = envs.Glide(50, seed=0)
    env.reset()
    good = sum(env.step(env.expert())[1] for _ in range(30)).mean()
    env.reset()
    idle = sum(env.step(torch.zeros(50, 2))[1] for _ in range(30)).mean()
    assert good > 20 > idle


def test_gymnasiums_environments():
    pytest.importorskip("gymnasium")
    env = envs.make("gym:CartPole-v1", 3)
    assert (env.obs_dim, env.action_dim, env.continuous) == (4, 2, False)
    env.reset()
    ended = torch.zeros(3, dtype=torch.bool)
    for _ in range(60):
        seen, reward, done = env.step(torch.ones(3, dtype=torch.int64))
        ended |= done
        assert seen.shape == (3, 4)
        assert reward.tolist() == [1, 1, 1]
    assert bool(ended.all())
    env = envs.make("gym:Pendulum-v1", 1)
    assert (env.action_dim, env.continuous) == (1, True)
    assert env.half.item() == 2  # [-1, 1] becomes the torque's [-2, 2]
    env.reset()
    env.step(torch.tensor([[0.5]]))


def test_bad_actions_and_names():
    env = envs.RepeatPrevious(2)
    env.reset()
    with pytest.raises(ValueError, match=r"action has shape \(3,\); expected \(2,\)"):
        env.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers from 0 to 3"):
        env.step(torch.tensor([0, 4]))
    glide = envs.Glide(1)
    glide.reset()
    with pytest.raises(ValueError, match="not finite"):
        glide.step(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="no environment 'maze'"):
        envs.make("maze")
    with pytest.raises(ValueError, match="k is 60"):
        envs.RepeatPrevious(1, k=60)
