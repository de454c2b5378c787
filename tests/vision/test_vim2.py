"""ViM2: no original exists; the properties that the paper states, and the habits of a backbone."""

import pytest
import torch

import zoo
import zoo.testing
from zoo_vision.vim2 import ChannelMixer, ViM2, WeightedAverage, vim2

TINY = {"dims": 8, "depths": (1, 2, 1, 1), "state": 4, "window": 3, "num_classes": 7}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_channel_mixer_sees_channels_from_both_ends():
    """Exchanging the two directions' parameters and flipping the channels flips the result."""
    mixer = ChannelMixer((3, 3), state=4)
    x = torch.randn(2, 7, 5, 8)
    y = mixer(x)
    assert y.shape == x.shape
    mixer.forwards, mixer.backwards = mixer.backwards, mixer.forwards
    torch.testing.assert_close(mixer(x.flip(-1)), y.flip(-1), rtol=1e-5, atol=1e-6)


def test_the_channel_mixer_mixes_all_channels_inside_a_window_alone():
    mixer = ChannelMixer((3, 3), state=4)
    x = torch.randn(1, 6, 6, 8, requires_grad=True)
    mixer(x)[0, 1, 1, 4].backward()
    reached = x.grad.abs()[0]
    assert (reached[:3, :3].amax((0, 1)) > 0).all()
    assert reached[3:].sum() == 0
    assert reached[:, 3:].sum() == 0


def test_averages_start_as_a_chain_and_learn():
    average = WeightedAverage(3, 2, "token")
    tokens, channels = [torch.randn(2, 3) for _ in range(3)], [torch.randn(2, 3) for _ in range(2)]
    assert torch.equal(average(tokens, channels), tokens[-1])
    with torch.no_grad():
        average.of_tokens.copy_(torch.tensor([1.0, 2.0, 3.0]))
        average.of_channels.copy_(torch.tensor([4.0, 5.0]))
    expected = tokens[0] + 2 * tokens[1] + 3 * tokens[2] + 4 * channels[0] + 5 * channels[1]
    torch.testing.assert_close(average(tokens, channels), expected)
    model = vim2(**TINY)
    model(torch.randn(2, 3, 64, 64)).pow(2).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    block = model.stages[1].blocks[1]
    assert (block.token_input.of_tokens.grad != 0).all()
    assert block.token_input.of_tokens.shape == (2,)
    assert block.channel_input.of_tokens.shape == (3,)


def test_windows_of_the_whole_map_fix_the_size():
    model = vim2(**{**TINY, "window": None, "img_size": 64}).eval()
    assert model.stages[0].blocks[0].channel_mixer.window == (16, 16)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match="window=None"):
        model(torch.randn(1, 3, 96, 64))
    assert vim2(**TINY).eval()(torch.randn(1, 3, 60, 52)).shape == (1, 7)


def test_gradient_checkpointing_changes_no_gradient():
    model, x = vim2(**TINY), torch.randn(1, 3, 64, 64)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_card_says_that_only_the_paper_exists():
    info = zoo.info("vim2_tiny")
    assert "paper" in str(info)
    assert isinstance(zoo.create("vim2_tiny", **TINY), ViM2)
    assert zoo.testing.check_features("vim2_tiny")
    assert zoo.testing.check_compile("vim2_tiny")
    assert zoo.testing.check_export("vim2_tiny")


@pytest.mark.parametrize(("name", "millions"), [("vim2_tiny", 20), ("vim2_small", 43), ("vim2_base", 74)])
def test_sizes_are_near_the_papers(name, millions):
    assert zoo.testing.check_parameters(name)
    assert sum(p.numel() for p in zoo.create(name, device="meta").parameters()) == pytest.approx(
        millions * 1e6, rel=0.03
    )
