"""PPO: advantages and loss against their definitions, the parallel form against the rollout, learning."""

import math

import pytest
import torch

import zoo.testing
from zoo.runs import Run
from zoo_rl import distributions, envs
from zoo_rl.ppo import Settings, Trainer, advantages_of, ppo_loss
from zoo_rl.s5_rl import S5ActorCritic


def small(env, **more):
    torch.manual_seed(0)
    return S5ActorCritic(
        env.obs_dim, env.action_dim, env.continuous, d_model=16, ssm_size=16, n_layers=1, encoder_dim=16, body_dim=16,
        C_init="trunc_standard_normal", **more,
    )  # fmt: skip


def test_advantages_are_the_sums_of_the_definition():
    torch.manual_seed(0)
    values, rewards, last = torch.randn(3, 7), torch.randn(3, 7), torch.randn(3)
    ends = torch.rand(3, 7) < 0.3
    gamma, lam = 0.9, 0.7
    found = advantages_of(values, rewards, ends, last, gamma, lam)
    following = torch.cat([values[:, 1:], last[:, None]], 1)
    for b in range(3):
        for t in range(7):
            total, weight = 0.0, 1.0
            for k in range(t, 7):
                on = 0.0 if ends[b, k] else 1.0
                total += weight * float(rewards[b, k] + gamma * on * following[b, k] - values[b, k])
                weight *= gamma * lam
                if ends[b, k]:
                    break
            assert float(found[b, t]) == pytest.approx(total, abs=1e-5)
    # with lambda 1 they are returns less values
    whole = advantages_of(values[:, :3], rewards[:, :3], torch.tensor([[0, 0, 1]] * 3) > 0, last, 1.0, 1.0)
    torch.testing.assert_close(whole[:, 0], rewards[:, :3].sum(1) - values[:, 0])


def test_the_loss_at_the_rollouts_own_policy():
    torch.manual_seed(0)
    logits, value = torch.randn(4, 5, 3), torch.randn(4, 5)
    outputs = {"logits": logits, "value": value}
    actions = torch.randint(3, (4, 5))
    old = distributions.log_prob(outputs, actions)
    advantages, targets = torch.randn(4, 5), torch.randn(4, 5)
    loss, parts = ppo_loss(outputs, actions, old, value, advantages, targets, Settings(entropy=0.1))
    assert abs(float(parts["actor"])) < 1e-6  # normalised advantages times ratios of one
    assert float(parts["value"]) == pytest.approx(0.5 * float((value - targets).square().mean()))
    assert float(loss) == pytest.approx(float(parts["actor"] + parts["value"] - 0.1 * parts["entropy"]))
    # a ratio beyond the clip brings no gradient where the advantage would push it further
    moved = logits.clone().requires_grad_()
    shifted = {"logits": moved, "value": value}
    ratio_up = ppo_loss(shifted, actions, old - 1, value, advantages, targets, Settings())[1]["actor"]
    (gradient,) = torch.autograd.grad(ratio_up, moved)
    normal = (advantages - advantages.mean()) / advantages.std(correction=0)
    assert not gradient[normal > 0].any()
    assert gradient[normal < 0].any()


def test_distributions_agree_with_torchs():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4)
    mean, std = torch.randn(2, 3, 2), torch.rand(2, 3, 2) + 0.1
    action, drawn = torch.randint(4, (2, 3)), torch.randn(2, 3, 2)
    ours = {"logits": logits}
    theirs = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(distributions.log_prob(ours, action), theirs.log_prob(action))
    torch.testing.assert_close(distributions.entropy(ours), theirs.entropy())
    ours = {"mean": mean, "std": std}
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    torch.testing.assert_close(distributions.log_prob(ours, drawn), theirs.log_prob(drawn))
    torch.testing.assert_close(distributions.entropy(ours), theirs.entropy())
    many = distributions.sample({"logits": torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2)})
    assert float(many.float().mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    "make",
    [
        lambda: envs.Glide(8, max_steps=5),
        lambda: envs.StatelessCartPole(8, max_steps=7),
        lambda: envs.PreviousAction(envs.MetaCartPole(8, trials=2, max_steps=4)),
    ],
    ids=["continuous", "discrete", "in context"],
)
def test_the_update_sees_what_the_rollout_saw(make):
    env = make()
    trainer = Trainer(small(env), env, Settings(steps=12, epochs=1, minibatches=2))
    trainer.rollout()  # so that the next one begins in the middle of episodes
    data = trainer.rollout()
    assert bool(data.resets.any())
    assert any(bool(m["ssm"].any()) for m in data.memory)
    with torch.no_grad():
        outputs = trainer.model(data.obs, data.resets, state=[{"ssm": m["ssm"].clone()} for m in data.memory])
        again = distributions.log_prob(outputs, data.actions)
    torch.testing.assert_close(outputs["value"], data.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, data.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.targets, data.advantages + data.values)
    assert set(trainer.update(data)) == {"loss", "actor", "value", "entropy"}


class Recall:
    """A sign is shown, then nothing for a step; then say which it was. Whoever forgets earns 0 on average."""

    obs_dim, action_dim, continuous = 1, 2, False

    def __init__(self, num_envs):
        self.num_envs, self.generator = num_envs, torch.Generator().manual_seed(0)

    def reset(self):
        self.time = 0
        self.sign = torch.randint(2, (self.num_envs,), generator=self.generator)
        return self.sign[:, None] * 2.0 - 1

    def step(self, action):
        self.time += 1
        done = torch.full((self.num_envs,), self.time == 3)
        if self.time < 3:
            return torch.zeros(self.num_envs, 1), torch.zeros(self.num_envs), done
        reward = (action == self.sign) * 2.0 - 1
        return self.reset(), reward, done


@pytest.mark.parametrize("memoryless", [False, True])
def test_learns_what_needs_memory(memoryless):
    env = Recall(64)
    settings = Settings(steps=12, total_steps=64 * 12 * 20, epochs=4, minibatches=2, learning_rate=5e-3)
    rows = Trainer(small(env), env, settings, memoryless=memoryless).train()
    assert abs(rows[0]["return"]) < 0.4
    assert rows[-1]["return"] < 0.4 if memoryless else rows[-1]["return"] > 0.8


def test_bad_arguments():
    env = envs.Glide(6)
    with pytest.raises(ValueError, match="do not divide into 4 minibatches"):
        Trainer(small(env), env, Settings(minibatches=4))
    with pytest.raises(ValueError, match="the model has obs_dim 4"):
        Trainer(small(env), envs.StatelessCartPole(8), Settings(minibatches=4))


def test_settings_that_are_refused():
    for name, value in (("steps", 0), ("epochs", 0), ("minibatches", 0), ("learning_rate", float("nan")), ("clip", 0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            Settings(**{name: value})


@pytest.mark.parametrize("make", [envs.RepeatPrevious, envs.StatelessCartPole, envs.MetaCartPole, envs.Glide])
def test_a_run_goes_on(tmp_path, make):
    """Environments, memories and episodes as well: what is learnt afterwards is the same."""

    def trained(run, report):
        env = envs.PreviousAction(make(4, seed=3))
        model = small(env)
        rows = Trainer(
            model, env, Settings(steps=7, total_steps=7 * 4 * 4, epochs=2, minibatches=2, anneal=True), seed=5
        ).train(report, run)
        assert [row["steps"] for row in rows] == [28, 56, 84, 112]
        return model

    zoo.testing.check_resume(trained, tmp_path)


def test_an_environment_without_a_state_begins_anew(tmp_path):
    class Bare:
        """As gymnasium's: what it holds cannot be kept."""

        def __init__(self):
            self.inner = envs.Glide(2, seed=1)
            self.num_envs, self.obs_dim, self.action_dim, self.continuous = 2, 4, 2, True
            self.reset, self.step = self.inner.reset, self.inner.step

    settings = Settings(steps=3, total_steps=18, epochs=1, minibatches=1)
    for done in (0, 3):
        run = Run(tmp_path / "training.run", every=0)
        env = Bare()
        rows = Trainer(small(env), env, settings).train(run=run)
        assert [len(rows), run.begun, run.kept] == [3, done, 3]
