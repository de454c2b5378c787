"""HAX: which keys each pattern gives, the causal form, decoding, the task."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo_language.generation import generate
from zoo_language.hax import HaxLM, arguments_of
from zoo_language.hax_sparse import Pattern, SparseAttention
from zoo_language.hax_task import JointRecall, recall_accuracy

PATTERNS = [
    "full", "sliding_window", "sink", "dilated", "sign_bin_lsh", "argmax_lsh", "key_selection",
    "sliding_window+sink", "sliding_window+dilated", "sign_bin_lsh+key_selection", "argmax_lsh+sign_bin_lsh",
]  # fmt: skip


def build(arch, base="mamba", keys=4, **more):
    torch.manual_seed(0)
    ssm = {"d_state": 4} if base == "mamba" else {"d_state": 4, "headdim": 8, "ngroups": 2}
    model = HaxLM(16, 2, 40, base, arch, keys, 3, 12, ssm, **more).eval()
    with torch.no_grad():  # a fresh model's attention hardly differs from a mean
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(batch=2, length=21, seed=0):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_positional_keys_by_hand():
    at = torch.arange(9)[None]
    for arch, expected in {
        "full": [0, 1, 2, 3, 4, 5, 6, 7],
        "sliding_window": [4, 5, 6, 7],
        "sink": [0, 1, 2, 3],
        "dilated": [2, 5],  # 12 // 4 apart
        "sliding_window+sink": [0, 1, 6, 7],
        "sliding_window+dilated": [5, 6, 7],  # 12 // 2 = 6 apart
    }.items():
        allowed, past = Pattern(arch, keys=4, max_length=12).allowed(at, at, [], None)
        assert allowed[0, 7].nonzero()[:, 0].tolist() == expected
        assert past[0, 7].sum() == 8
        assert not (allowed & ~past).any()


def test_buckets_and_scores_by_hand():
    at = torch.arange(30)[None]
    random = np.random.RandomState(0)
    bucket = torch.from_numpy(random.randint(0, 3, (2, 1, 30)))
    score = torch.from_numpy(random.permutation(30))[None].float()
    found = {}
    found["lsh"], _ = Pattern("sign_bin_lsh", keys=4).allowed(at, at, [(bucket[0], bucket[1])], None)
    found["best"], _ = Pattern("key_selection", keys=4).allowed(at, at, [], score)
    found["both"], _ = Pattern("sign_bin_lsh+key_selection", keys=4).allowed(at, at, [(bucket[0], bucket[1])], score)
    for i in range(30):
        same = [j for j in range(i + 1) if bucket[1, 0, j] == bucket[0, 0, i]]
        best = sorted(range(i + 1), key=lambda j: -float(score[0, j]))
        expected = {"lsh": set(same[-4:]), "best": set(best[:4]), "both": set(same[-2:]) | set(best[:2])}
        for name, keys in expected.items():
            assert set(found[name][0, i].nonzero()[:, 0].tolist()) == keys


@pytest.mark.parametrize("base", ["mamba", "mamba2"])
@pytest.mark.parametrize("arch", PATTERNS)
def test_causal_models_are_read_in_pieces(arch, base):
    model = build(arch, base, causal=True)
    x = ids()
    lengths = torch.tensor([5, 2])
    with torch.no_grad():
        whole = model(x)
        pieces, state = [], model.init_state(2)
        pieces.append(model(x[:, :7], state=state))
        pieces.append(model(x[:, 7:12], state=state))
        pieces += [model.step(x[:, t], state)[:, None] for t in range(12, 21)]
        # a padded prefill: row 1 goes on from its own end
        state = model.init_state(2)
        model(x[:, :5], state=state, lengths=lengths)
        after = model.step(torch.stack([x[0, 5], x[1, 2]]), state)
        changed = x.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 40
        other = model(changed)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, torch.stack([whole[0, 5], whole[1, 2]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other[:, :-1], whole[:, :-1], rtol=1e-4, atol=1e-5)


def test_the_original_looks_ahead():
    """By default as there: buckets come from means over the whole text, so a last token changes what comes before."""
    x = ids(1, 24)
    changed = x.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 40
    model = build("sign_bin_lsh", keys=6, hash_seed=3)
    with torch.no_grad():
        assert (model(x)[0, :-1] - model(changed)[0, :-1]).abs().max() > 0.01
    assert not model.streams
    assert build("sliding_window+sink").streams
    assert not build("dilated").streams  # its first queries have no key and average over everything


def test_models_that_look_ahead_read_the_text_again():
    model = build("sign_bin_lsh+key_selection", hash_seed=3)
    prompts = [ids(1, 9, 1)[0].tolist(), ids(1, 5, 2)[0].tolist()]
    texts, state = generate(model, prompts, max_new_tokens=6)
    assert state.position.tolist() == [15, 11]
    for prompt, text in zip(prompts, texts, strict=True):
        seen = list(prompt)
        for token in text.tokens:
            with torch.no_grad():
                assert int(model(torch.tensor([seen]))[0, -1].argmax()) == token
            seen.append(token)


def test_projections_are_drawn_anew_or_fixed():
    x = ids(2, 30)
    torch.manual_seed(0)
    fresh, fixed = build("sign_bin_lsh"), build("sign_bin_lsh", hash_seed=1)
    with torch.no_grad():
        assert not torch.equal(fresh(x), fresh(x))
        assert torch.equal(fixed(x), fixed(x))


def test_mamba2_ignores_the_mask_of_a_single_text():
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[:, :4] = False
    for base, ignored in (("mamba", False), ("mamba2", True)):
        model = build("full", base)
        with torch.no_grad():
            alone, without = model(ids(1), attention_mask=mask[:1]), model(ids(1))
            both = model(ids(2), attention_mask=mask)
        assert torch.equal(alone, without) == ignored
        assert (both[:1] - without).abs().max() > 1e-3


def test_training_loss_reaches_the_key_scores():
    task = JointRecall(3, 3, 4)
    random = np.random.RandomState(0)
    items = [task.item(3, 3, random) for _ in range(4)]
    x, asked = torch.stack([a for a, _ in items]), torch.stack([m for _, m in items])
    model = build("sign_bin_lsh+key_selection").train()
    model.training_loss(x, asked, attention_mask=x != 3).backward()
    # A bias in the last layer moves all scores alike; only their differences count.
    learns = [(n, p) for n, p in model.named_parameters() if not n.endswith("dx_proj_3.bias")]
    assert not [n for n, p in learns if p.grad is None or not p.grad.any()]
    plain = build("sliding_window").train()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(plain(x)[:, :-1][asked[:, :-1] == 1], x[:, 1:][asked[:, :-1] == 1])
        torch.testing.assert_close(plain.training_loss(x, asked), expected)


def test_task():
    task = JointRecall(4, 3, 5)
    assert task.length == 2 * 4 * (2 * 3 + 1) + 2
    x, asked = task.item(3, 2, np.random.RandomState(5))
    used = 2 * 3 * (2 * 2 + 1) + 2
    assert x[0] == 1
    assert x[1 + 15] == 4
    assert (x[used:] == 3).all()
    assert asked.sum() == 3 * 2
    table = {}
    for half, start in enumerate((1, 17)):
        for row in x[start : start + 15].reshape(3, 5).tolist():
            for key, value in (row[1:3], row[3:5]):
                if half:
                    assert table[row[0], key] == value
                table[row[0], key] = value
    assert (asked.nonzero()[:, 0] > 16).all()
    right = torch.nn.functional.one_hot(torch.roll(x, -1), task.vocab_size).float()[None]
    assert recall_accuracy(right, x[None], asked[None]) == 1
    right[0, asked.nonzero()[0, 0]] = 0
    assert recall_accuracy(right, x[None], asked[None]) == pytest.approx(5 / 6)


def test_no_item_comes_twice():
    task, seen = JointRecall(2, 2, 2), set()
    first = [x.tolist() for x, _ in task.items(100, smallest=2, seen=seen)]
    second = [x.tolist() for x, _ in task.items(30, smallest=2, seen=seen)]  # the same draws, so all but new ones
    assert len(first) == 100
    assert len({tuple(x) for x in first + second}) == 130
    with pytest.raises(ValueError, match="too few different items"):
        list(task.items(3, smallest=1))  # one context, one key, two values


def test_recipe_runs(monkeypatch, capsys):
    recipe = Path(__file__).parents[2] / "plugins/language/recipes/train_recall.py"
    monkeypatch.setattr("sys.argv", [str(recipe), "mamba2_key_selection", "--steps", "2", "--batch-size", "4"])
    runpy.run_path(str(recipe), run_name="__main__")
    assert "mamba2_key_selection: recall 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparse_arch": "none+sink"}, "sparse_arch is 'none.sink'"),
        ({"sparse_arch": "full+sink"}, "'full' or 'none' alone"),
        ({"sparse_arch": "sink+sliding_window+dilated", "sparse_keys": 2}, "gives no key"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sparse_arch": "sign_bin_lsh"}, "num_hash is 64"),
        ({"heads": 3}, "no configuration key heads"),
    ],
)
def test_what_is_refused(change, said):
    config = {"base_arch": "mamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "sparse_arch": "full"}
    with pytest.raises(ValueError, match=said):
        zoo.reference("hax").build(config | change, {})


def test_switches_of_the_original_that_no_vector_holds():
    """A width of its own for Mamba; Mamba-2 reads neither that nor rms_norm; no pattern at all averages everything."""
    config = {"base_arch": "mamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    torch.manual_seed(0)
    model = HaxLM(**arguments_of(config | {"intermediate_size": 40, "sparse_keys": 4})).eval()
    branch = model.layers[0].mixer.sparse
    assert (branch.d_inner, branch.pattern.arch) == (40, "none")
    h = torch.randn(1, 5, 40)
    torch.testing.assert_close(branch(h), h.mean(1, keepdim=True).expand_as(h))
    other = config | {"base_arch": "mamba2", "head_dim": 8, "rms_norm": False, "intermediate_size": 40}
    assert HaxLM(**arguments_of(other)).layers[0].mixer.d_ssm == 32


def test_argmax_hashes_may_be_many():
    branch = SparseAttention(8, 4, Pattern("argmax_lsh", 2, num_hash=80))
    codes = torch.nn.functional.one_hot(torch.tensor([3, 70, 79]), 80) > 0
    assert branch._bucket("argmax_lsh", codes).tolist() == [3, 70, 79]
