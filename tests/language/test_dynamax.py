"""DYNAMAX's stated properties: where tokens leave, what skipped blocks remember, what the exits learn from."""

import pytest
import torch

from zoo_language.dynamax import DynamaxLM, saved
from zoo_language.generation import generate
from zoo_language.mamba import MambaLM

ATTENTION = {"causal": True, "head_dim": 8, "num_heads": 2, "rotary_emb_dim": 4, "d_conv": 3}
BACKBONES = {
    "mamba": {"ssm": {"d_state": 4}},
    "mamba2": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}},
    "hybrid": {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}, "attention_layers": [1, 3, 5],
               "attention": ATTENTION},
    "transformer": {"attention_layers": range(6), "attention": ATTENTION, "d_intermediate": 24},
}  # fmt: skip


def build(backbone="mamba2", **more):
    torch.manual_seed(0)
    arguments = {"stride": 1, "exit_ssm": {"d_state": 4}} | more
    model = DynamaxLM({"d_model": 16, "n_layer": 6, "vocab_size": 40} | BACKBONES[backbone], **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt(length=7, seed=0):
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", ["calm", "ffn", "mamba"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_thresholds(backbone, kind):
    model = build(backbone, exit_kind=kind)
    whole, _ = generate(model.model, [prompt()], max_new_tokens=12)
    found, state = generate(model, [prompt()], max_new_tokens=12)  # 2: nothing leaves
    assert found[0].tokens == whole[0].tokens
    assert saved(state, 6).item() == 0
    for level, block in ((0.0, 3), (1.01, 6)):
        model.threshold = level
        _, state = generate(model, [prompt()], max_new_tokens=12)
        told = state.layers[-1]
        assert told["block"].tolist() == [block]
        assert told["ran"].tolist() == [12 * block]
        assert saved(state, 6).item() == pytest.approx(1 - block / 6)
    # The same state, ever stricter: a token leaves never earlier.
    before = 0
    state = model.prefill(torch.tensor([prompt()]))
    for level in (0.0, 0.04, 0.08, 0.15, 0.3, 0.6, 1.01):
        model.threshold = level
        own = state.fork()
        model.step(torch.tensor([5]), own)
        block = int(own.layers[-1]["block"])
        assert block >= before
        before = block
    assert before == 6


@pytest.mark.parametrize("backbone", ["mamba", "mamba2"])
def test_skipped_scans(backbone):
    for policy in ("partial", "skip"):
        model = build(backbone, threshold=0.0, policy=policy)
        state = model.prefill(torch.tensor([prompt()]))
        before, hidden = state.fork(), {}
        step = model.exits["3"].step

        def seen(x, own, step=step, hidden=hidden):
            hidden["x"] = x
            return step(x, own)

        model.exits["3"].step = seen
        model.step(torch.tensor([5]), state)
        for i in range(6):
            same = all(torch.equal(before.layers[i][k], state.layers[i][k]) for k in before.layers[i])
            assert same == (policy == "skip" and i >= 3)
        if policy == "partial":  # what a whole step from the hidden state at the exit leaves
            for i in range(3, 6):
                layer, own = model.layers[i], {k: v.clone() for k, v in before.layers[i].items()}
                layer.mixer.step(layer.norm(hidden["x"]), own)
                for name, value in own.items():
                    torch.testing.assert_close(state.layers[i][name], value)


@pytest.mark.parametrize("backbone", ["hybrid", "transformer"])
def test_skipped_attention_copies_keys_and_values(backbone):
    model = build(backbone, threshold=0.0)
    state = model.prefill(torch.tensor([prompt()]))
    model.step(torch.tensor([5]), state)
    source = 1 if backbone == "hybrid" else 2  # the last attention up to block 3
    skipped = [3, 5] if backbone == "hybrid" else [3, 4, 5]
    for i in skipped:
        for name in "kv":
            assert torch.equal(state.layers[i][name][:, 7], state.layers[source][name][:, 7])
            assert not torch.equal(state.layers[i][name][:, 6], state.layers[source][name][:, 6])
    model.threshold = 2.0
    assert torch.isfinite(model.step(torch.tensor([6]), state)).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_texts_leave_each_by_itself(backbone):
    model = build(backbone, exit_kind="mamba", threshold=0.09)
    prompts = [prompt(), prompt(4, 1), prompt(9, 2)]
    together, state = generate(model, prompts, max_new_tokens=15)
    blocks = []
    for i, text in enumerate(together):
        alone, own = generate(model, [prompts[i]], max_new_tokens=15)
        assert alone[0].tokens == text.tokens
        assert int(own.layers[-1]["ran"]) == int(state.layers[-1]["ran"][i])
        blocks.append(int(own.layers[-1]["ran"]))
    assert min(blocks) < 15 * 6
    assert max(blocks) > 15 * 3


def test_an_exit_that_is_the_models_own_head_agrees():
    torch.manual_seed(0)
    backbone = MambaLM(16, 4, 40, layer="Mamba2", ssm={"d_state": 8, "headdim": 8}).eval()
    model = DynamaxLM.around(backbone, exits=[4], exit_norm=True).eval()
    assert model.model is backbone
    with torch.no_grad():
        model.exits["4"].norm.weight.copy_(backbone.norm_f.weight)
        model.exits["4"].head.weight.copy_(backbone.embedding.weight)
        whole, early = model.exit_logits(torch.tensor([prompt()]))
    torch.testing.assert_close(early[4], whole)


def test_mamba_exits_see_the_past_and_step_as_they_read():
    model = build(exit_kind="mamba", exit_layer="Mamba2", exit_ssm={"d_state": 8, "headdim": 8})
    x, other = torch.tensor([prompt()]), torch.tensor([prompt()])
    other[0, 5] = (other[0, 5] + 1) % 40
    with torch.no_grad():
        _, a = model.exit_logits(x)
        _, b = model.exit_logits(other)
        for block in a:
            torch.testing.assert_close(a[block][:, :5], b[block][:, :5])
        model.threshold = [0.0, 2.0, 2.0]
        state = model.prefill(x[:, :4])  # prefill moves the exits' states
        for t in range(4, 7):
            state = model.prefill(x[:, :t])
            torch.testing.assert_close(model.step(x[:, t], state), a[3][:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["kl", "relaxed"])
def test_exits_learn_from_the_whole_model(form):
    model = build(exit_kind="ffn").train()
    x = torch.tensor([prompt(30), prompt(30, 1)])
    loss = model.exit_loss(x, form=form)
    loss.backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.exits.parameters())
    optimiser = torch.optim.Adam(model.exits.parameters(), 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        model.exit_loss(x, form=form).backward()
        optimiser.step()
    assert model.exit_loss(x, form=form) < 0.5 * loss


def test_the_loss_by_hand():
    model = build(exits=[2, 4])
    x = torch.tensor([prompt()])
    with torch.no_grad():
        whole, early = model.exit_logits(x)
        top, ids = whole.topk(5, dim=-1)
        q = top.softmax(-1)
        kl, relaxed = [], []
        for block in (2, 4):
            log_p = early[block].log_softmax(-1)
            kl.append((q * (q.log() - log_p.gather(-1, ids))).sum(-1).mean())
            own = log_p.argmax(-1)
            right = torch.tensor([[int(own[0, t]) in ids[0, t].tolist() for t in range(7)]])
            target = torch.where(right, own, whole.argmax(-1))
            relaxed.append(torch.nn.functional.cross_entropy(early[block][0], target[0]))
        torch.testing.assert_close(model.exit_loss(x), kl[0] + 0.5 * kl[1])
        torch.testing.assert_close(model.exit_loss(x, form="relaxed"), relaxed[0] + 0.5 * relaxed[1])


def test_confidence_by_entropy():
    model = build(confidence="entropy")
    rows = torch.zeros(2, 40)
    rows[1, 3] = 50
    torch.testing.assert_close(model.sure(rows), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"exit_kind": "linear"}, "exit_kind is 'linear'"),
        ({"policy": "copy"}, "policy is 'copy'"),
        ({"exits": [7]}, "blocks 1 to 6"),
        ({"confidence": "margin"}, "confidence is 'margin'"),
    ],
)
def test_what_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        build(**more)
    model = build(threshold=[0.5])
    with pytest.raises(ValueError, match="1 values for 3 exits"):
        model.step(torch.tensor([1]), model.init_state(1))
