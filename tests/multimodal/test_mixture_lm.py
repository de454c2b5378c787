"""Models around the Mixture-of-Mamba block: discrete tokens of two and three modalities, and diffused patches."""

import math

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo_multimodal.mixture_lm import MixtureLM, fork, generate, losses
from zoo_multimodal.mixture_training import Settings, bits, fit, fit_transfusion
from zoo_multimodal.transfusion import TransfusionMamba


def lm(seed=0, sizes=(20, 12, 8), **more):
    torch.manual_seed(seed)
    return MixtureLM(16, 2, sizes, ssm={"d_state": 4}, **more).eval()


def ids(batch=2, length=14, high=40, seed=1):
    return torch.randint(0, high, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", [{}, {"dense": True}, {"split": ["in_proj"]}, {"tie_embeddings": False}], ids=str)
def test_whole_pieces_and_steps(form):
    model, x = lm(**form), ids()
    with torch.no_grad():
        whole = model(x)
        state = model.init_state(2)
        pieces = torch.cat([model(x[:, :6], state=state), model(x[:, 6:], state=state)], 1)
        zoo.testing.assert_close(pieces, whole, tolerance=1e-5)
        state = model.init_state(2)
        steps = torch.stack([model.step(x[:, t], state) for t in range(x.shape[1])], 1)
        zoo.testing.assert_close(steps, whole, tolerance=1e-5)


def test_modalities_follow_from_ids():
    model = lm()
    assert model.starts == [0, 20, 32]
    assert model.modality(torch.tensor([0, 19, 20, 31, 32, 39])).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_text_of_one_modality_needs_no_other():
    """Experts of the others may hold anything; with NaN they would show."""
    model, x = lm(), ids(high=20)
    with torch.no_grad():
        before = model(x)
        for name, p in model.named_parameters():
            if "_proj.1." in name or "_proj.2." in name:
                p.fill_(torch.nan)
        assert torch.equal(model(x), before)


def test_losses_by_modality_and_padding():
    model = lm()
    x, lengths = ids(3), torch.tensor([14, 5, 9])
    with torch.no_grad():
        total, count = losses(model, x, lengths)
        other = x.clone()
        other[1, 5:] = 0
        assert torch.allclose(losses(model, other, lengths)[0], total)
        by_hand = torch.zeros(3)
        for row, n in zip(x, lengths.tolist(), strict=True):
            chance = model(row[None, : n - 1])[0].log_softmax(-1)
            for t in range(1, n):
                by_hand[int(model.modality(row[t]))] -= chance[t - 1, row[t]]
    assert int(count.sum()) == 13 + 4 + 8
    torch.testing.assert_close(total, by_hand)
    mean = bits(model, [row[:n].tolist() for row, n in zip(x, lengths.tolist(), strict=True)])
    assert mean == pytest.approx((by_hand / count / math.log(2)).tolist(), rel=1e-4)


def test_generation_is_rereading():
    """Greedy tokens from the state are those of reading the whole text again at each step, within a modality."""
    model, x = lm(), ids(1)
    with torch.no_grad():
        state = model.init_state(1)
        last = model(x, state=state)[0, -1]
        kept = fork(state)
        found, _ = generate(model, last, state, 1, max_new_tokens=6)
        text = x
        for token in found:
            wanted = 20 + int(model(text)[0, -1, 20:32].argmax())
            assert token == wanted
            text = torch.cat([text, torch.tensor([[token]])], 1)
        assert all(torch.equal(a["ssm"], b["ssm"]) for a, b in zip(kept, fork(kept), strict=True))
        again, _ = generate(model, last, fork(kept), 1, max_new_tokens=6)
        assert again == found
        drawn = [
            generate(model, last, fork(kept), max_new_tokens=8, temperature=1.0, top_k=5,
                     generator=torch.Generator().manual_seed(s))[0]
            for s in (0, 0, 1)
        ]  # fmt: skip
        assert drawn[0] == drawn[1] != drawn[2]


def test_bad_models():
    for arguments, said in (
        ({"vocab_sizes": []}, "one positive size for each modality"),
        ({"vocab_sizes": [5], "alphabet": "abc"}, "expected 6"),
        ({"vocab_sizes": [6, 4], "patch": 2}, "expected both positive"),
    ):
        with pytest.raises(ValueError, match=said):
            MixtureLM(8, 1, **arguments)
    with pytest.raises(ValueError, match=r"expected integers \(batch, length\)"):
        lm()(torch.zeros(3))


def test_training_learns_what_the_other_modality_says():
    """An image token repeats the text token before it: only a shared state can know."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        [t for pair in zip(a, [12 + i for i in a], strict=True) for t in pair]
        for a in torch.randint(0, 12, (300, 6), generator=generator).tolist()
    ]
    torch.manual_seed(0)
    model = MixtureLM(16, 1, (12, 12), ssm={"d_state": 4})
    history = fit(model, rows[:280], Settings(steps=120, batch_size=16, rate=1e-2, warmup=10))
    text, image = bits(model, rows[280:])
    assert history[-1] < history[0]
    assert image < 0.3 < 3.3 < text  # log2(12) = 3.58 bits cannot be known
    with pytest.raises(ValueError, match="document 0 has ids from 0 to 99"):
        fit(model, [[0, 99]], Settings(steps=1))


def test_training_goes_on_after_an_interruption(tmp_path):
    rows = np.random.default_rng(0).integers(0, 12, (20, 7)).tolist()

    def discrete(run, report):
        torch.manual_seed(0)
        model = MixtureLM(16, 1, (12, 12), ssm={"d_state": 4})
        fit(model, rows, Settings(steps=5, batch_size=4), report, run)
        return model

    def continuous(run, report):
        model = transfusion()
        ids = torch.tensor([[0, 1, model.patch_id, model.patch_id, 2]]).repeat(6, 1)
        latents = torch.randn(6, 5, model.latent_dim, generator=torch.Generator().manual_seed(1))
        lengths = torch.full((6,), 5)
        fit_transfusion(model, ids, latents, lengths, Settings(steps=5, batch_size=4), report, run)
        return model

    zoo.testing.check_resume(discrete, tmp_path / "a", after=3)
    zoo.testing.check_resume(continuous, tmp_path / "b")


# -- Transfusion


def transfusion(seed=0, **more):
    torch.manual_seed(seed)
    return TransfusionMamba(16, 2, 10, 4, timesteps=50, ssm={"d_state": 4}, **more).eval()


def mixed(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 10, (batch, 12), generator=generator)
    x[:, 3:7] = 10
    x[:, 9:11] = 10
    return x, torch.randn(batch, 12, 4, generator=generator)


def test_transfusion_goes_on_from_its_state():
    model, (x, latents) = transfusion(), mixed()
    steps = torch.where(x == 10, 7, 0)
    with torch.no_grad():
        whole = model(x, latents, steps)
        state = model.start_state(2)
        cuts = [slice(0, 5), slice(5, 12)]
        pieces = [model(x[:, c], latents[:, c], steps[:, c], state=state) for c in cuts]
        for name in ("logits", "noise"):
            zoo.testing.assert_close(torch.cat([p[name] for p in pieces], 1), whole[name], tolerance=1e-5)


def test_transfusion_reads_patches_at_patches_only():
    model, (x, latents) = transfusion(), mixed()
    steps = torch.where(x == 10, 7, 0)
    other = torch.where((x == 10)[..., None], latents, 100.0)
    with torch.no_grad():
        assert torch.equal(model(x, other, steps + 30 * (x != 10))["logits"], model(x, latents, steps)["logits"])
    with pytest.raises(ValueError, match=r"expected \(batch, length\), \(batch, length, 4\)"):
        model(x, latents[..., :3], steps)


def test_noise_levels():
    model = transfusion()
    share = model.signal(torch.arange(51))
    assert float(share[0]) == pytest.approx(1, abs=1e-6)
    assert share[-1] < 1e-6
    assert (share.diff() < 0).all()
    x, noise = torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0)
    mixed_ = model.add_noise(x, noise, torch.tensor([[0, 50]]))
    torch.testing.assert_close(mixed_[0, 0], x[0, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(mixed_[0, 1], noise[0, 1], atol=1e-3, rtol=0)
    assert model.pictures(mixed()[0]).tolist()[0] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("steps", [5, 50])
def test_drawing_with_perfect_predictions_gives_the_picture(steps):
    """With the true noise at every level the sampler ends at the picture, from the state behind the text."""
    model = transfusion()
    picture = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    seen = []

    def hidden(ids, x, levels, *, lengths=None, state=None):
        share = model.signal(levels)[..., None].clamp(min=1e-5)
        seen.append(int(levels[0, 0]))
        return (x - share.sqrt() * picture) / (1 - share).clamp(min=1e-12).sqrt()

    model.hidden, model.latent_out, model.text_head = hidden, torch.nn.Identity(), lambda h: h
    found, _ = model.draw(3, model.start_state(1), steps=steps, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, picture, atol=1e-4, rtol=1e-4)
    assert seen == [*sorted(set(seen), reverse=True)]
    assert len(seen) == steps + 1  # the last one reads the clean picture
    with pytest.raises(ValueError, match="expected 1 to 50"):
        model.draw(3, model.start_state(1), steps=51)


def test_one_level_down_follows_the_posterior():
    """Mean and deviation of a step, against the definition by the product of two normal distributions."""
    model = transfusion()
    x, noise = torch.tensor([[[0.3]]]), torch.tensor([[[-0.5]]])
    high, low = float(model.signal(torch.tensor(30))), float(model.signal(torch.tensor(20)))
    clean = (0.3 + (1 - high) ** 0.5 * 0.5) / high**0.5
    step = high / low  # x = sqrt(step) x_low + ..., x_low = sqrt(low) clean + ...
    precision = step / (1 - step) + 1 / (1 - low)
    mean = (0.3 * step**0.5 / (1 - step) + low**0.5 * clean / (1 - low)) / precision
    found = [float(model.denoise(x, noise, 30, 20, torch.tensor([[[z]]]))) for z in (0.0, 1.0)]
    assert found[0] == pytest.approx(mean, rel=1e-5)
    assert found[1] - found[0] == pytest.approx(precision**-0.5, rel=1e-5)


def test_transfusion_learns_and_writes_pictures():
    """Documents: a number, then a picture of two patches that are that number everywhere."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (200,), generator=generator)
    x = torch.tensor([[0, 2, 10, 10, 3]]).repeat(200, 1)
    x[:, 0] = kind
    latents = torch.zeros(200, 5, 4)
    latents[:, 2:4] = (kind * 2.0 - 1)[:, None, None]
    torch.manual_seed(0)
    model = TransfusionMamba(24, 1, 10, 4, timesteps=50, ssm={"d_state": 4})
    settings = Settings(steps=250, batch_size=32, rate=1e-2, warmup=10)
    history = fit_transfusion(model, x, latents, torch.full((200,), 5), settings)
    assert sum(history[-20:]) < 0.5 * sum(history[:20])
    for number in (0, 1):
        ids_, pictures = model.generate(
            torch.tensor([[number]]), begin_image=2, patches=2, max_new_tokens=4, stop=(3,), steps=25
        )
        assert ids_ == [2, 10, 10, 3]
        assert float(pictures[0].mean()) == pytest.approx(number * 2.0 - 1, abs=0.5)
