"""UniAnimate's diffusion: schedule, sampling, windows, loss, training."""

import numpy as np
import pytest
import torch

from zoo.testing import assert_close, check_resume
from zoo_generation.unianimate import diffusion
from zoo_generation.unianimate.diffusion import Schedule, sample, starting_noise, timesteps, windows
from zoo_generation.unianimate.training import Batch, train

from .test_unianimate_model import inputs, small

SCHEDULE = Schedule()


def test_the_last_step_is_noise():
    assert float(SCHEDULE.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-12)
    plain = diffusion.betas(zero_terminal_snr=False)
    assert float(plain[0]) == pytest.approx(0.00085)
    assert float(plain[-1]) == pytest.approx(0.012)
    assert float(SCHEDULE.betas[0]) == pytest.approx(0.00085)  # the first step is kept


def test_steps():
    steps, stride = timesteps(30)
    assert (len(steps), steps[0], steps[-1], stride) == (31, 991, 1, 33)
    assert timesteps(4)[0] == [751, 501, 251, 1]
    assert timesteps(1000)[0][0] == 999
    with pytest.raises(ValueError, match="0 steps"):
        timesteps(0)


def test_windows():
    assert windows(20) == [list(range(20))]
    found = windows(70)
    assert [w[0] for w in found] == [0, 24, 38]
    assert found[-1] == list(range(38, 70))
    assert {i for w in found for i in w} == set(range(70))
    assert windows(40)[0] == list(range(32))
    for frames in range(33, 140):
        assert {i for w in windows(frames) for i in w} == set(range(frames))
        assert all(len(set(w)) == 32 for w in windows(frames))
    with pytest.raises(ValueError, match="overlap by 8"):
        windows(9, 8, 8)


def test_ddim_by_its_formula():
    """x_prev = sqrt(abar') x0 + sqrt(1 - abar') eps with eps from x and x0, as the original writes it."""

    class Fixed(torch.nn.Module):
        video_compositions = ()

        def encode(self, size, **_):
            return None

        def forward(self, x, t, fps=None, conditions=None):
            return 0.3 * x + t[0].double() / 1000

    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    found = sample(Fixed(), x, {}, schedule=SCHEDULE, count=4, guidance=None)
    for step in (751, 501, 251, 1):
        v = 0.3 * x + step / 1000
        a, past = SCHEDULE.alphas_cumprod[step], SCHEDULE.alphas_cumprod[max(step - 250, 0)]
        x0 = a.sqrt() * x - (1 - a).sqrt() * v
        eps = (x / a.sqrt() - x0) / (1 / a - 1).sqrt()
        x = past.sqrt() * x0 + (1 - past).sqrt() * eps
    assert_close(found, x, tolerance=1e-10)
    noisy = [
        sample(Fixed(), x, {}, schedule=SCHEDULE, count=4, guidance=None, eta=1.0, generator=torch.manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert bool(torch.isfinite(sample(Fixed(), x, {}, schedule=SCHEDULE, count=1000, guidance=None)).all())


def test_guidance_and_windows():
    model = small()
    x, _, given = inputs(frames=7)
    names = {k: given[k] for k in ("image", "dwpose", "randomref")}
    kind = {"schedule": SCHEDULE, "count": 2, "zero_y": given["zero_y"]}
    one = sample(model, x, names, guidance=1.0, **kind)
    assert_close(sample(model, x, names, guidance=None, **kind), one, tolerance=0.0)
    assert (sample(model, x, names, guidance=2.5, **kind) - one).abs().max() > 1e-3
    # windows, by hand, for one step
    found = sample(model, x, names, guidance=2.5, size=4, overlap=2, **{**kind, "count": 1})
    v, counts = torch.zeros_like(x), torch.zeros(7)
    t = torch.tensor([1])
    with torch.no_grad():
        for w in ([0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]):
            part = {"image": names["image"], "randomref": names["randomref"]}
            part["dwpose"] = names["dwpose"][:, :, [0] + [i + 1 for i in w]]
            c = model(x[:, :, w], t, **part, zero_y=given["zero_y"])
            u = model(x[:, :, w], t, zero_y=given["zero_y"])
            v[:, :, w] += u + 2.5 * (c - u)
            counts[w] += 1
    v = v / counts.view(1, 1, -1, 1, 1)
    a, s = SCHEDULE.at(1, x)
    expected = SCHEDULE.noised(a * x - s * v, 0, s * x + a * v)
    assert_close(found, expected, tolerance=1e-5)


def test_starting_noise():
    ref = torch.randn(1, 4, 5, 3, 3)
    plain = starting_noise(SCHEDULE, ref, strength=0.0, generator=torch.manual_seed(0))
    noise = torch.randn(ref.shape, generator=torch.manual_seed(0))
    assert_close(plain, SCHEDULE.noised(ref, 949, noise), tolerance=1e-6)
    more = starting_noise(SCHEDULE, ref, generator=torch.manual_seed(0)) - plain
    assert_close(more, more[..., :1, :1].expand_as(more), tolerance=1e-5)  # the same for all pixels of a frame
    assert torch.equal(starting_noise(SCHEDULE, ref, prior=None, strength=0.0, generator=torch.manual_seed(0)), noise)


def test_loss_of_the_true_v_is_zero():
    x0, noise, t = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2), torch.tensor([10, 900])
    a, s = SCHEDULE.at(t, x0)

    def perfect(x, steps):
        return a * noise - s * x0

    assert diffusion.training_loss(perfect, x0, t, {}, schedule=SCHEDULE, noise=noise).abs().max() == 0

    def nothing(x, steps):
        return torch.zeros_like(x)

    found = diffusion.training_loss(nothing, x0, t, {}, schedule=SCHEDULE, noise=noise)
    assert_close(found, (a * noise - s * x0).square().flatten(1).mean(1), tolerance=1e-6)
    shared = diffusion.offset_noise(torch.zeros(1, 4, 3, 64, 64), 10.0, torch.manual_seed(0)).mean((3, 4))
    assert shared.std() > 5


def test_training_learns():
    """A batch that repeats itself is learned, and conditions take turns."""
    model = small(temporal="mamba", dropout=0.0, temporal_dropout=0.0, zero_init=True, p_all_zero=0.0, misc_dropout=0.0)
    x, _, given = inputs(batch=2)
    given.pop("zero_y")
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("local_image") is None), with_kwargs=True)

    def batches(r: np.random.Generator) -> Batch:
        return Batch(torch.zeros_like(x) + 0.5, given)

    losses = train(model, batches, steps=24, rate=3e-3, warmup=4, lowest=1e-4, average=0.9, first_frame=0.5)
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:4])
    assert not model.training
    assert any(seen)
    assert not all(seen)
    given["local_image"] = None
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    train(model, lambda r: Batch(x, given), steps=1, unconditional=1.0)
    assert all(value is None for value in seen[-1].values())
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        train(model, lambda r: Batch(x * float("nan"), {}), steps=1)


def test_training_goes_on_after_an_interruption(tmp_path):
    x, _, given = inputs(batch=2)
    given.pop("zero_y")

    def trained(run, report):
        model = small(temporal="mamba", dropout=0.1)
        more = {"average": 0.9, "first_frame": 0.5, "unconditional": 0.2}
        train(model, lambda r: Batch(x + float(r.normal()), given), steps=5, run=run, report=report, **more)
        return model

    check_resume(trained, tmp_path, after=3)
