"""The flow: its path, guidance, and solvers against solutions that are known."""

import math

import pytest
import torch

from zoo_generation.dimsum import flow, solvers


def test_the_path_runs_from_noise_to_data():
    noise, data = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    for t, wanted in ((0.0, noise), (1.0, data)):
        torch.testing.assert_close(flow.position(noise, data, torch.full((3,), t, dtype=torch.float64)), wanted)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (flow.position(noise, data, t + 1e-6) - flow.position(noise, data, t - 1e-6)) / 2e-6
    torch.testing.assert_close(flow.velocity(noise, data, t), slope, rtol=1e-6, atol=1e-8)


def test_the_loss_is_the_error_of_the_velocity():
    noise, data, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.rand(3)
    target = flow.velocity(noise, data, t)
    assert not flow.loss(lambda x, t, y: target, data, noise=noise, t=t).any()
    assert flow.loss(lambda x, t, y: target + 2, data, noise=noise, t=t).tolist() == pytest.approx([4, 4, 4])


def test_guidance():
    def model(x, t, y):
        return torch.cat([x * y.view(-1, 1, 1, 1), 10 * x], dim=1)  # two channels out, the second unguided

    x, t = torch.randn(4, 1, 2, 2), torch.tensor([0.0, 1.0, 0.3, 0.3])
    y = torch.tensor([3, 3, 1, 1])
    out = flow.guided(model, x, t, y, 2.0, channels=1)
    first = x[:2]  # used twice
    torch.testing.assert_close(out[:, :1], torch.cat([first * (1 + 2 * 2)] * 2))
    torch.testing.assert_close(out[:, 1:], torch.cat([10 * first] * 2))
    faded = flow.guided(model, x, t, y, 2.0, 4.0, channels=1)
    torch.testing.assert_close(faded[:2, :1], torch.stack([first[0] * 5, first[1] * 3]))  # full at 0, none at 1
    torch.testing.assert_close(faded[2:, :1], faded[:2, :1])
    assert float(flow.adaptive_scale(torch.tensor(0.5), 3.8, 4.0)) == pytest.approx(
        2.8 * (1 - math.cos(math.pi / 16)) / 2 + 1
    )
    with pytest.raises(ValueError, match="x has 3 samples and y 4"):
        flow.guided(model, x[:3], t, y, 2.0)


def oscillator(t, x):
    return torch.stack([x[1], -25 * x[0]]) + 0 * t


START = torch.tensor([1.0, 0.0], dtype=torch.float64)


def exact(t):
    return torch.tensor([math.cos(5 * t), -5 * math.sin(5 * t)], dtype=torch.float64)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_fixed_steps_have_their_order(method, order):
    errors = [
        (solvers.fixed(oscillator, START, torch.linspace(0, 1, n + 1), method)[-1] - exact(1)).norm()
        for n in (200, 400)
    ]
    assert float(errors[0] / errors[1]) == pytest.approx(2**order, rel=0.1)
    with pytest.raises(ValueError, match="method is 'rk4'"):
        solvers.fixed(oscillator, START, torch.linspace(0, 1, 3), "rk4")


def test_dopri5_meets_its_tolerance_at_every_time():
    times = torch.linspace(0, 1, 37)
    for tolerance in (1e-4, 1e-7):
        calls = []
        found = solvers.dopri5(
            lambda t, x, calls=calls: calls.append(1) or oscillator(t, x), START, times, atol=tolerance, rtol=tolerance
        )
        wanted = torch.stack([exact(float(t)) for t in times])
        assert float((found - wanted).abs().max()) < 200 * tolerance
        assert torch.equal(found[0], START)
    assert len(calls) > 100


def test_dopri5_steps_as_torchdiffeq_does():
    """What torchdiffeq 0.2.5 answers in float64: the number of evaluations, some of their times, two outputs."""
    calls = []

    def field(t, x):
        calls.append(float(t))
        return torch.stack([x[1], -25 * x[0] * (1 + t)])

    found = solvers.dopri5(field, START, torch.tensor([0.0, 0.3, 1.0]), atol=1e-6, rtol=1e-3)
    assert len(calls) == 74
    times = [4e-07, 3.996e-05, 0.00043956, 0.004435564, 0.044395604, 0.20369263, 0.404943235, 0.606193839, 0.577137954,
             0.751360319, 0.925582684, 0.906184269, 1.061008218]  # fmt: skip
    assert calls[1::6] == pytest.approx(times, abs=1e-8)
    assert found[1].tolist() == pytest.approx([0.00485538737, -5.37387771], rel=1e-7)
    assert found[2].tolist() == pytest.approx([0.824136800, 1.208602351], rel=1e-7)


def test_dopri5_is_of_fifth_order():
    """One step of h: the error falls by 2^6 when h is halved."""
    errors = []
    for h in (0.02, 0.01):
        after, _, _ = solvers._step(
            oscillator, torch.tensor(0.0, dtype=torch.float64), START, oscillator(0, START),
            torch.tensor(h, dtype=torch.float64),
        )  # fmt: skip
        errors.append(float((after - exact(h)).norm()))
    assert errors[0] / errors[1] == pytest.approx(64, rel=0.1)
    assert sum(solvers._ERROR) == pytest.approx(0, abs=1e-12)
    assert sum(solvers._MIDDLE) == pytest.approx(0.5, abs=1e-9)


def test_dopri5_takes_fewer_steps_where_nothing_happens():
    calls = []
    solvers.dopri5(lambda t, x: calls.append(float(t)) or 0 * x, START, torch.tensor([0.0, 1.0]))
    assert len(calls) < 80
    with pytest.raises(RuntimeError, match="the solution is lost at t = 0"):
        solvers.dopri5(lambda t, x: x * math.nan, START, torch.tensor([0.0, 1.0]))


def test_sampling_follows_the_flow():
    """The exact velocity of a single image leads every noise to it."""
    target = torch.randn(1, 4, 4)

    def model(x, t, y):
        angle = (t * math.pi / 2).view(-1, 1, 1, 1)
        noise = (x - angle.sin() * target) / angle.cos().clamp(min=1e-6)
        return flow.velocity(noise, target.expand_as(x), t)

    noise = torch.randn(3, 1, 4, 4)
    found = flow.sample(model, noise, steps=200, method="euler")
    torch.testing.assert_close(found, target.expand_as(found), rtol=0, atol=0.05)


def test_guided_sampling_asks_the_model_once_for_both():
    sizes = []

    def model(x, t, y):
        sizes.append((len(x), y.tolist()))
        return torch.zeros_like(x)

    noise, times = torch.randn(2, 1, 2, 2), []
    found = flow.sample(model, noise, torch.tensor([3, 4]), null=9, method="euler", steps=2, cfg=2.0, trace=times)
    assert sizes == [(4, [3, 4, 9, 9])] * 2
    assert times == [0.0, 0.5]
    assert torch.equal(found, noise)
    for options, words in (
        ({"method": "rk4"}, "method is 'rk4'"),
        ({"steps": 0}, "steps is 0"),
        ({"cfg": 2.0}, "cfg is 2.0, which needs labels"),
    ):
        with pytest.raises(ValueError, match=words):
            flow.sample(model, noise, **options)
