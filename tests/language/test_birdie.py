"""Birdie: prefix layers, objectives, packing, the agent."""

import itertools

import pytest
import torch

from zoo_language.birdie import Agent, RewardModel, exploration, reward_frequencies, scale_actions
from zoo_language.birdie_lm import BirdieLM, two_way_scan
from zoo_language.birdie_objectives import OBJECTIVES, CharacterTokenizer, NoSample, objective
from zoo_language.birdie_packing import Packer

TEXT = "the quick brown fox jumps over the lazy dog and runs far away into the old forest at night " * 4


def test_two_way_scan_by_hand():
    x = torch.tensor([[[1.0, 1], [2, 2], [4, 4], [8, 8]]])
    decay = torch.full_like(x, 0.5)
    prefix = torch.tensor([[True, True, False, False]])
    found = two_way_scan(x, decay, prefix, None)
    assert found[0, :, 0].tolist() == [1, 2.5, 5.25, 10.625]  # left to right everywhere
    # Right to left: nothing flows into or inside the generated part; the prefix sees its first token (the start token).
    assert found[0, :, 1].tolist() == [3, 4, 4, 8]


@pytest.mark.parametrize("kind", ["gated_ssm", "hawk"])
def test_prefix_is_read_both_ways_and_the_rest_causally(kind):
    torch.manual_seed(0)
    model = BirdieLM(30, 16, 24, 4, kind=kind).double().eval()
    ids = torch.randint(0, 30, (1, 9))
    mask = torch.tensor([[1] * 5 + [3] * 4])
    other = ids.clone()
    other[0, 4] = (other[0, 4] + 1) % 30  # the prefix's last token
    later = ids.clone()
    later[0, 7] = (later[0, 7] + 1) % 30
    with torch.no_grad():
        a, b, c = (model(x, attention_mask=mask) for x in (ids, other, later))
    assert not torch.allclose(a[0, 0], b[0, 0])  # seen from the first position
    torch.testing.assert_close(a[0, :7], c[0, :7])  # generated tokens are not seen from before
    assert not torch.allclose(a[0, 7:], c[0, 7:])


def test_packed_samples_do_not_meet():
    torch.manual_seed(0)
    model = BirdieLM(30, 16, 24, 4).double().eval()
    first, second = torch.randint(0, 30, (1, 5)), torch.randint(0, 30, (1, 6))
    masks = torch.tensor([[1, 1, 3, 3, 3]]), torch.tensor([[1, 1, 1, 1, 3, 3]])
    segments = torch.tensor([[1] * 5 + [2] * 6])
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), attention_mask=torch.cat(masks, 1), segment_ids=segments)
        alone = [model(x, attention_mask=m) for x, m in zip((first, second), masks, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_fit_the_space_and_repeat(name):
    tokenizer = CharacterTokenizer()
    settings = {"remaining_space": 320, "rng_seed": 4}
    if name == "selective_copying":
        settings |= {"min_delimiter_prefix_length": 2, "min_delimiter_suffix_length": 2}
    run = objective(name, settings, tokenizer)
    sample = run(TEXT)
    assert sample == run(TEXT)
    assert sample.label_ids
    assert len(sample.input_ids) + len(sample.label_ids) <= 320
    used = TEXT[: len(TEXT) - len(sample.unused_input_ids)]
    assert tokenizer.decode(sample.unused_input_ids) == TEXT[len(used) :]


def test_unknown_objective_or_setting():
    with pytest.raises(ValueError, match="no objective 'guessing'"):
        objective("guessing", {}, CharacterTokenizer())
    with pytest.raises(ValueError, match="'copying' has no setting speed"):
        objective("copying", {"speed": 3}, CharacterTokenizer())


def test_settings_are_the_original_ones():
    """Its default seed, an end mark on labels, other marks; settings of other objectives are passed over."""
    tokenizer = CharacterTokenizer()
    settings = {"remaining_space": 320, "mask_prefix": "<", "mask_suffix": ">", "paradigm_end": "[E]"}
    sample = objective("infilling", settings | {"prefix_fraction": 0.5}, tokenizer)(TEXT)
    assert sample == objective("infilling", settings | {"rng_seed": 42}, tokenizer)(TEXT)
    assert tokenizer.decode(sample.label_ids).startswith("<0>")
    assert tokenizer.decode(sample.label_ids).endswith("[E]")
    assert "<0>" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    ("name", "settings", "given"),
    [
        ("infilling", {"remaining_space": 20}, ""),
        ("selective_copying", {"remaining_space": 60}, ""),
        ("prefix_language_modeling", {"remaining_space": 14}, "<|PREFIX LM|>"),
        ("autoencoding", {"remaining_space": 200, "corruption_rate": 0.0, "max_attempts": 2}, ""),
    ],
)
def test_what_gives_no_sample_says_so_and_keeps_the_text(name, settings, given):
    tokenizer = CharacterTokenizer()
    with pytest.raises(NoSample) as error:
        objective(name, settings, tokenizer)(TEXT)
    assert tokenizer.decode(error.value.sample.input_ids) == given
    assert tokenizer.decode(error.value.sample.unused_input_ids) == TEXT
    with pytest.raises(NoSample, match="minimum_sequence_length"):
        objective(name, settings | {"minimum_sequence_length": 9999}, tokenizer)(TEXT)


def test_reward_model_with_positions():
    """Rotation depends on differences alone; slow frequencies are divided by 8, fast ones kept."""
    plain, scaled = (reward_frequencies(64, scaled=s) for s in (False, True))
    waves = 2 * torch.pi / plain
    torch.testing.assert_close(scaled[waves < 8192], plain[waves < 8192])
    torch.testing.assert_close(scaled[waves > 32768], plain[waves > 32768] / 8)
    torch.manual_seed(0)
    model = RewardModel(4, 2, [32, 32], 9, rotary=True)
    attention = model.layers[1]
    q, k = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    first = attention.turn(q.expand(1, 1, 9, 8))[..., 3, :] @ attention.turn(k)[..., 1, :].mT
    later = attention.turn(q.roll(4, 2))[..., 7, :] @ attention.turn(k.roll(4, 2))[..., 5, :].mT
    torch.testing.assert_close(first, later)
    assert model(torch.randn(2, 9, 4), 7).shape == (2, 9, 2)


def test_reward_model_leaves_out_channels_that_fill_no_head():
    assert RewardModel(4, 2, [30, 30], 5).layers[1].q_proj.weight.shape == (28, 30)
    with pytest.raises(ValueError, match="hold 1 heads of 64"):
        RewardModel(4, 2, [64], 5)


def test_packer_refuses_what_does_not_fit():
    packer = Packer(1, 10, 2)
    assert not packer.can_accept([1] * 8, [2] * 3)
    assert not packer.can_accept([], [1])
    with pytest.raises(ValueError, match="fits in no row"):
        packer.add([1] * 8, [2] * 3)
    assert packer.add([5, 6, 7], [8, 9, 4, 3, 2])  # 8 of 10: what is left is the minimum


def test_exploration_starts_high_and_ends_low():
    values = [exploration(s, 100, 0.1, 0.9, warmup_steps=10, cook_steps=5) for s in range(100)]
    assert values[:5] == [1.0] * 5
    assert values[99] == pytest.approx(0.1)
    assert exploration(0, 100, 0.0, 0.0, cook_steps=5) == 0
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


def test_actions_are_probabilities():
    found = scale_actions(torch.tensor([[0.2, -0.1, 0.5], [0.3, 0.3, 0.4]]))
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    assert found.min() >= 0


def test_agent_prefers_what_pays():
    """One of three objectives improves in proportion to its share; after some evaluations it gets more than a third."""
    agent = Agent(
        [0, 1, 2], 1000, hidden_dims=(32, 32), max_evaluations=32, candidates=512, seed=0, explore={"max_val": 0.3}
    )
    torch.manual_seed(0)
    losses, share = [3.0, 3.0, 3.0], torch.full((3,), 1 / 3)
    for step in range(12):
        agent.observe(losses, steps=60)
        share = agent.action(step * 80)
        assert float(share.sum()) == pytest.approx(1, abs=1e-5)
        losses = [losses[0] * (1 - 0.25 * float(share[0])), losses[1] * 1.002, losses[2] * 1.002]
    assert losses[0] < 3.0 * (1 - 0.25 / 3) ** 10
