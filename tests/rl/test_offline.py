"""Training Decision Mamba: windows, the loss, self-evolution, learning from returns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zoo.testing
from zoo_rl import offline
from zoo_rl.decision_mamba import DecisionMamba
from zoo_rl.trajectories import from_arrays


def data(lengths=(5, 9, 3)):
    rng = np.random.default_rng(0)
    steps = sum(lengths)
    ends = np.zeros(steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    return from_arrays({
        "observations": rng.standard_normal((steps, 5)) * 3 + 1, "actions": rng.uniform(-1, 1, (steps, 3)),
        "rewards": rng.standard_normal(steps), "terminals": ends,
    })  # fmt: skip


def model(**more):
    torch.manual_seed(0)
    return DecisionMamba(5, 3, 16, 1, 6, 40, d_state=4, **more)


def test_windows_are_padded_as_the_original_pads():
    table = data()
    windows = offline.Windows(table, 6, 10.0, 40, seed=0)
    batch = windows.draw(200)
    states = (table.observations - windows.mean) / windows.std
    assert batch.states.shape == (200, 6, 5)
    assert not bool(batch.mask.all())
    for row in range(200):
        count = int(batch.mask[row].sum())
        assert batch.mask[row].tolist() == [False] * (6 - count) + [True] * count
        assert bool((batch.actions[row, : 6 - count] == -10).all())
        assert not batch.returns_to_go[row, : 6 - count].any()
        # observations of zeros, normalised as all others
        nothing = torch.tensor(-windows.mean / windows.std).expand(6 - count, -1)
        torch.testing.assert_close(batch.states[row, : 6 - count], nothing)
        first = int(np.flatnonzero((states == batch.states[row, 6 - count].numpy()).all(1))[0])
        episode = next(e for e in table.episodes if e.start <= first < e.stop)
        rows = slice(first, first + count)
        assert rows.stop <= episode.stop
        np.testing.assert_array_equal(batch.actions[row, 6 - count :], table.actions[rows])
        np.testing.assert_allclose(
            batch.returns_to_go[row, 6 - count :, 0], table.returns_to_go()[rows] / 10, rtol=1e-5
        )
        assert batch.timesteps[row, 6 - count :].tolist() == list(
            range(first - episode.start, first + count - episode.start)
        )


def test_causal_windows_begin_with_their_episodes():
    windows = offline.Windows(data(), 9, 1.0, 4, causal=True, seed=0)
    batch = windows.draw(50)
    assert bool(batch.mask[:, 0].all())
    assert not batch.timesteps[:, 0].any()
    assert batch.timesteps.max() == 3  # of 4 that have an embedding
    short = offline.Windows(data(), 4, 1.0, 40, causal=True, seed=0).draw(100)
    assert short.timesteps[:, 0].max() > 0


def test_episodes_are_drawn_by_their_length():
    windows = offline.Windows(data((2, 18)), 2, 1.0, 40, seed=0)
    late = (windows.draw(2000).timesteps.max(1).values > 1).float().mean()
    assert 0.8 < float(late) < 0.95  # nine in ten come from the long one, two of its eighteen windows begin it


def test_the_loss_is_the_originals():
    batch = offline.Windows(data(), 6, 10.0, 40, seed=0).draw(8)
    found = model()(*batch.inputs())
    settings = offline.Settings()
    a, s, r = (torch.zeros(()) for _ in range(3))
    steps = pairs = 0
    for b in range(8):
        for t in range(6):
            if batch.mask[b, t]:
                a = a + (found["actions"][b, t] - batch.actions[b, t]).square().sum()
                steps += 3
            if t < 5 and batch.mask[b, t + 1]:
                s = s + F.smooth_l1_loss(found["states"][b, t], batch.states[b, t + 1], reduction="sum")
                r = r + F.smooth_l1_loss(found["returns_to_go"][b, t], batch.returns_to_go[b, t + 1], reduction="sum")
                pairs += 1
    wanted = 0.9 * a / steps + 0.05 * s / (5 * pairs) + 0.05 * r / pairs
    torch.testing.assert_close(offline.decision_loss(found, batch, settings), wanted)
    alone = offline.decision_loss({"actions": found["actions"]}, batch, settings)
    torch.testing.assert_close(alone, a / steps)
    # windows of one step have no next one
    batch = offline.Windows(data(), 1, 10.0, 40, seed=0).draw(8)
    assert bool(torch.isfinite(offline.decision_loss(model()(*batch.inputs()), batch, settings)))


def test_the_past_policy_softens_the_target():
    batch = offline.Windows(data(), 6, 10.0, 40, seed=0).draw(4)
    found = {"actions": model()(*batch.inputs())["actions"]}
    past = torch.randn_like(batch.actions).requires_grad_()
    settings = offline.Settings()
    mixed = (found["actions"] - (0.7 * batch.actions + 0.3 * past))[batch.mask].square().mean()
    loss = offline.decision_loss(found, batch, settings, past, 0.3)
    torch.testing.assert_close(loss, mixed)
    loss.backward()
    assert past.grad is None  # the past does not learn


def test_the_pasts_weight_grows_to_its_limit():
    paper = offline.Settings(iterations=10, alpha=0.85)
    assert [paper.past_weight(i) for i in (1, 4, 10)] == pytest.approx([0.085, 0.34, 0.5])
    assert offline.Settings(evolution="released").past_weight(10) == 0
    assert offline.Settings(evolution=None).past_weight(10) == 0


@pytest.mark.parametrize("evolution", ["paper", "released"])
@pytest.mark.parametrize("fine", ["tiled", "causal"])
def test_learns_that_the_return_tells_the_action(fine, evolution):
    """Actions are the sign of the return-to-go: only a policy that reads it can know."""
    rng = np.random.default_rng(1)
    sign = np.repeat(rng.choice([-1.0, 1.0], 60), 6)
    table = from_arrays({
        "observations": rng.standard_normal((360, 5)), "actions": np.repeat(sign[:, None] * 0.8, 3, 1),
        "rewards": sign, "terminals": np.tile([0, 0, 0, 0, 0, 1], 60),
    })  # fmt: skip
    m = model(fine=fine)
    settings = offline.Settings(
        iterations=3, steps=25, batch_size=32, learning_rate=5e-3, warmup=5, scale=1.0, evolution=evolution
    )
    rows = []
    windows = offline.train(m, table, settings, on_iteration=rows.append)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[1]["past"] == (0.5 if evolution == "paper" else 0)
    states = torch.zeros(1, 1, 5)
    with torch.no_grad():
        for wanted in (1.0, -1.0):
            found = m.get_action(
                states, torch.zeros(1, 1, 3), torch.full((1, 1, 1), 6 * wanted), torch.zeros(1, 1).long()
            )
            if fine == "causal":  # trained from the beginning of episodes on, without a window in front
                found = m(states, torch.zeros(1, 1, 3), torch.full((1, 1, 1), 6 * wanted), torch.zeros(1, 1).long())[
                    "actions"
                ]
            assert bool((found.sign() == wanted).all())
    assert windows.mean.shape == (5,)


def test_bad_data():
    with pytest.raises(ValueError, match="observations have 5 numbers; the model takes 4"):
        offline.train(DecisionMamba(4, 3, 16, 1), data())
    table = data()
    with pytest.raises(ValueError, match="expected numbers from -1 to 1"):
        offline.train(model(), from_arrays({
            "observations": table.observations, "actions": table.actions * 4, "rewards": table.rewards,
        }))  # fmt: skip
    discrete = from_arrays({"observations": np.zeros((4, 5)), "actions": np.arange(4), "rewards": np.zeros(4)})
    with pytest.raises(ValueError, match="one integer a step"):
        offline.train(model(), discrete)
    with pytest.raises(ValueError, match="evolution is 'slow'"):
        offline.Settings(evolution="slow")


def test_settings_that_are_refused():
    for name, value in (("iterations", 0), ("steps", 0), ("batch_size", 0), ("scale", 0.0), ("learning_rate", np.nan)):
        with pytest.raises(ValueError, match=f"{name} is"):
            offline.Settings(**{name: value})


def test_no_warm_up():
    made = model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    offline.train(made, data(), offline.Settings(iterations=1, steps=1, batch_size=2, warmup=0))
    assert any(not torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(v.isfinite().all() for v in made.state_dict().values())


def test_a_loss_that_is_no_number_reaches_no_weight():
    made = model()
    with torch.no_grad():
        next(made.layers.parameters()).fill_(float("nan"))
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss is nan in iteration 1"):
        offline.train(made, data(), offline.Settings(iterations=1, steps=1, batch_size=2))
    for key, value in made.state_dict().items():
        assert torch.allclose(value, before[key], rtol=0, atol=0, equal_nan=True), key


@pytest.mark.parametrize("evolution", ["paper", None])
def test_a_run_goes_on(tmp_path, evolution):
    settings = offline.Settings(iterations=4, steps=2, batch_size=4, warmup=5, evolution=evolution, learning_rate=1e-2)

    def trained(run, report):
        made = model()
        torch.manual_seed(1)
        offline.train(made, data(), settings, seed=2, on_iteration=report, run=run)
        return made

    zoo.testing.check_resume(trained, tmp_path)
