"""EEGDM: what holds beside the recorded numbers. Folding, kept tokens, schedules, checkpoints as they are published."""

import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo_neuro.eegdm.backbone import DiffusionBackbone
from zoo_neuro.eegdm.diffusion import NoiseSchedule, diffusion_loss, sample
from zoo_neuro.eegdm.fusion import EEGClassifier
from zoo_neuro.eegdm.latents import LatentExtractor, LatentReducer
from zoo_neuro.eegdm.signals import inverse_mu_law, mu_law

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"d_model": 8, "d_state": 8, "n_layer": 3, "d_cond": 12, "d_cond_embed": 8, "n_class": 4}
SMALL = {**SIZES, "kernel_init": "diag-lin"}


def backbone(**changes) -> DiffusionBackbone:
    torch.manual_seed(0)
    return DiffusionBackbone(**{**SMALL, "zero_init": False, **changes}).eval()


def classifier(**changes) -> EEGClassifier:
    torch.manual_seed(0)
    settings = {"query": ["gate"], "reduce": ["std"], "L": 40, "window_size": 8, "window_step": 8, "n_clst": 3}
    head = {
        "num_heads": 2,
        "ff": 2,
        "clst_dim": "TP",
        "classifier_have_pos_embed": True,
        "classifier_stack_struct": "sf",
    }
    return EEGClassifier({**SMALL, "zero_init": False}, **{**settings, **head, **changes}).eval()


@pytest.mark.parametrize("name", ["backbone", "lft_classifier"])
def test_gradients_are_the_originals(name):
    zoo.testing.check_golden(GOLDEN / f"eegdm__{name}.safetensors", grad=True)


def test_long_signals_are_folded_as_published_checkpoints_were_trained():
    """Channel j of slot g holds piece (g C + j) % f of the real channel (g C + j) // f, seen as channel j."""
    model, channels, f, piece = backbone(), 3, 2, 20
    extractor = LatentExtractor(model, query=["gate", "inter"], use_cond=[3, 0, 1], fold=piece)
    x = torch.randn(2, channels, f * piece)
    found = extractor(x)
    assert found.shape == (2, channels, 3, 2, f * piece, 8)
    single = LatentExtractor(model, query=["gate", "inter"], use_cond=[3, 0, 1], fold=None)
    pieces = x.unflatten(2, (f, piece))
    for b, g, j in itertools.product(range(2), range(f), range(channels)):
        row = g * channels + j
        alone = torch.zeros(1, channels, piece)
        alone[0, j] = pieces[b, row // f, row % f]
        expected = single(alone)[0, j]
        torch.testing.assert_close(found[b, j, :, :, g * piece : (g + 1) * piece], expected, rtol=1e-5, atol=1e-6)


def test_the_callers_class_ids_stay():
    model, cond = backbone(have_null_class=True), torch.tensor([[-1], [3]])
    model(torch.randn(2, 1, 16), torch.tensor([[1], [2]]), cond)
    assert cond.tolist() == [[-1], [3]]
    assert (model.channels, model.n_class) == (4, 5)


def test_kept_tokens_give_the_same_answer():
    model = classifier(start=1, end=3)
    x = torch.randn(2, 4, 40)
    with torch.no_grad():
        whole, kept = model(x), model.tokens(x)
        torch.testing.assert_close(model.forward_tokens(kept), whole)
        # tokens of all layers, as a cache has them, are cut to those that are read
        every = classifier(start=0, end=3)
        every.extractor.model.load_state_dict(model.extractor.model.state_dict())
        torch.testing.assert_close(model.forward_tokens(every.tokens(x)), whole)


def test_the_frozen_backbone_gets_no_gradient_and_the_rest_does():
    model = classifier().train()
    assert not model.extractor.model.training
    model(torch.randn(2, 4, 40)).square().sum().backward()
    assert all(p.grad is None for p in model.extractor.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("extractor"))


@pytest.mark.parametrize(("noise", "differs"), [(None, False), (False, False), (True, True)])
def test_noise_of_training(noise, differs):
    model, x = classifier(fwd_with_noise=noise), torch.randn(1, 4, 40)
    kept = model.schedule.alphas_cumprod[1].sqrt()
    plain = classifier().eval()
    torch.testing.assert_close(model.tokens(x), plain.tokens(x if noise is None else kept * x))
    model.train()
    assert torch.equal(model.tokens(x), model.tokens(x)) is not differs


def test_reducer_takes_unbiased_deviations():
    latents = torch.randn(1, 2, 1, 1, 12, 3)
    tokens = LatentReducer(["gate"], ["std"], L=12, window_size=4, window_step=4)(latents)
    expected = latents[0, 1, 0, 0, 4:8].double()
    expected = ((expected - expected.mean(0)).square().sum(0) / 3).sqrt()
    torch.testing.assert_close(tokens[0, 0, 0, 1, 0, 1].double(), expected)


def test_signals_that_do_not_fit_are_refused():
    model = backbone()
    with pytest.raises(ValueError, match="every EEG channel"):
        model(torch.randn(2, 3, 16), torch.tensor([[1], [2]]), torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="channels in the order"):
        classifier()(torch.randn(2, 3, 40))
    with pytest.raises(ValueError, match="equal pieces"):
        LatentExtractor(model)(torch.randn(1, 4, 2001))
    with pytest.raises(ValueError, match="rate 1 only"):
        LatentExtractor(model)(torch.randn(1, 4, 2000), rate=0.9)
    local, ids = backbone(local_cond_ch=2, local_cond_upsample=[4, 2]), torch.tensor([[1], [2]])
    with pytest.raises(ValueError, match="reaches 32 samples"):
        local(torch.randn(2, 1, 40), ids, ids, torch.randn(2, 1, 2, 4))
    with pytest.raises(ValueError, match="local_cond_ch=0"):
        model(torch.randn(2, 1, 16), ids, ids, torch.randn(2, 1, 2, 4))
    with pytest.raises(ValueError, match="whole number"):
        classifier()(torch.randn(2, 4, 40), rate=0.93)


# -- diffusion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_a_perfect_prediction_gives_the_clean_signal(kind, schedule):
    s = NoiseSchedule(prediction_type=kind, beta_schedule=schedule)
    x, noise = torch.rand(3, 1, 50) * 1.6 - 0.8, torch.randn(3, 1, 50)
    for t in (0, 1, 20, 45):
        at = torch.full((3, 1), t)
        noisy = s.add_noise(x, noise, at)
        torch.testing.assert_close(s.clean(s.target(x, noise, at), t, noisy), x, rtol=1e-3, atol=2e-3)
    assert (s.alphas_cumprod.diff() < 0).all()
    assert 0 < s.alphas_cumprod[-1] < s.alphas_cumprod[0] < 1


def test_steps_back_are_the_posterior():
    """Mean and variance of q(x_{t-1} | x_t, x_0): Ho et al., arXiv 2006.11239, equations 6 and 7."""
    s = NoiseSchedule(beta_schedule="linear", clip_sample=False, prediction_type="sample")
    kept, beta, t = s.alphas_cumprod.double(), s.betas.double(), 13
    x0, x, noise = (torch.randn(1, 1, 9, dtype=torch.float64) for _ in range(3))
    mean = kept[t - 1].sqrt() * beta[t] / (1 - kept[t]) * x0
    mean = mean + (1 - beta[t]).sqrt() * (1 - kept[t - 1]) / (1 - kept[t]) * x
    deviation = ((1 - kept[t - 1]) / (1 - kept[t]) * beta[t]).sqrt()
    torch.testing.assert_close(s.step(x0, t, x, noise), mean + deviation * noise, rtol=1e-5, atol=1e-5)
    assert torch.equal(s.step(x0, 0, x, noise), s.step(x0, 0, x, -noise)), "the last step adds no noise"


def test_sampling_is_repeatable_and_stops_where_the_authors_stop():
    model, s, steps = backbone(), NoiseSchedule(num_train_timesteps=6), []
    start, cond = torch.randn(2, 1, 24), torch.tensor([[0], [2]])
    first, second = (
        sample(model, s, start, cond, generator=torch.Generator().manual_seed(4), each_step=steps.append)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert steps == [5, 4, 3, 2, 1] * 2
    with pytest.raises(ValueError, match="3 noises"):
        sample(model, s, start, cond, noises=torch.randn(3, 2, 1, 24))


def test_the_loss_is_the_error_of_the_velocity():
    model, s = backbone(), NoiseSchedule()
    x, noise, t, cond = (
        torch.randn(2, 1, 24),
        torch.randn(2, 1, 24),
        torch.tensor([[3], [40]]),
        torch.tensor([[0], [1]]),
    )
    kept = s.alphas_cumprod[t].unsqueeze(-1)
    noisy, target = kept.sqrt() * x + (1 - kept).sqrt() * noise, kept.sqrt() * noise - (1 - kept).sqrt() * x
    expected = (model(noisy, t, cond) - target).square().mean()
    torch.testing.assert_close(diffusion_loss(model, s, x, cond, noise=noise, t=t), expected)


def test_unknown_schedules_are_refused():
    for wrong in ({"beta_schedule": "round"}, {"prediction_type": "score"}, {"num_train_timesteps": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            NoiseSchedule(**wrong)
    with pytest.raises(ValueError, match="thresholding"):
        zoo.reference("eegdm").build({"scheduler": {"thresholding": True}}, {})


def test_large_values_are_suppressed_and_restored():
    x = torch.tensor([-40.0, -1.0, -0.5, 0.0, 1.0, 1.001, 7.0], dtype=torch.float64)
    y = mu_law(x)
    assert torch.equal(y[1:5], x[1:5])
    assert y[-1] == math.log(1 + 255 * 7) / math.log(256)
    torch.testing.assert_close(inverse_mu_law(y), x)


# -- checkpoints as they are published -------------------------------------------------------------------------------


def lightning(state, prefix_of_averages="ema.ema_model."):
    """What Lightning saves of the original's modules: both sets of weights, counters, hyperparameters."""
    wrong = {f"model.{k}": torch.zeros_like(v) for k, v in state.items()}
    averaged = {f"{prefix_of_averages}{k}": v for k, v in state.items()}
    counters = {"ema.initted": torch.tensor(True), "ema.step": torch.tensor(7)}
    return {"state_dict": wrong | averaged | counters, "epoch": 3, "pytorch-lightning_version": "2.5.1"}


@pytest.fixture
def their_function(monkeypatch):
    """A function under the name that the original's checkpoints mention."""
    module = types.ModuleType("src.util")

    def inv_staged_mu_law(x):
        raise AssertionError("code of a checkpoint was run")

    inv_staged_mu_law.__module__ = "src.util"
    inv_staged_mu_law.__qualname__ = "inv_staged_mu_law"
    module.inv_staged_mu_law = inv_staged_mu_law
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.util", module)
    return inv_staged_mu_law


def test_averaged_weights_of_a_lightning_checkpoint_are_read(tmp_path, their_function):
    own = backbone()
    content = lightning(zoo.reference("eegdm").to_reference(own.state_dict()))
    content["hyper_parameters"] = {"gen_kwargs": {"inv_data_trans": their_function, "shape": [1, 1000]}}
    torch.save(content, tmp_path / "backbone.ckpt")
    read = zoo.load(
        "eegdm_backbone_base",
        checkpoint=tmp_path / "backbone.ckpt",
        **{k: v for k, v in SMALL.items() if k != "kernel_init"},
    )
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in own.state_dict().items())


def test_a_classifiers_checkpoint_serves_the_backbone(tmp_path):
    own = classifier()
    torch.save(lightning(zoo.reference("eegdm").to_reference(own.state_dict())), tmp_path / "classifier.ckpt")
    read = zoo.load("eegdm_backbone_base", checkpoint=tmp_path / "classifier.ckpt", **SIZES)
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in own.extractor.model.state_dict().items())


def test_local_conditions_keep_the_originals_keys():
    model = backbone(local_cond_ch=2)
    keys = set(zoo.reference("eegdm").to_reference(model.state_dict()))
    assert "layers.0.local_cond_conv.2.parametrizations.weight.original1" in keys
    assert "layers.2.local_cond_linear.parametrizations.weight.original0" in keys
    again = zoo.reference("eegdm").to_zoo(zoo.reference("eegdm").to_reference(model.state_dict()), model=model)
    assert again.keys() == model.state_dict().keys()
