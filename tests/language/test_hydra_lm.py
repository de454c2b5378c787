"""Hydra's stated properties: each part against its definition, causality, what remains without gates."""

import pytest
import torch
import torch.nn.functional as F

from zoo_language.attention import rotary
from zoo_language.hydra_lm import HydraLM
from zoo_language.hydra_parts import ChunkExperts, ProductKeys, SparseGlobalAttention, SwiGLU, Workspace
from zoo_language.mamba import MambaLM

SIZES = {
    "d_model": 16, "n_layer": 4, "vocab_size": 40, "ssm": {"d_state": 4}, "heads": 2, "window": 5, "chunk": 4,
    "attention_every": 2, "d_ff": 12, "experts": 3, "slots": 3, "memory_layers": [1], "memory_keys": 6,
    "memory_heads": 2, "memory_top_k": 3,
}  # fmt: skip


def build(**more):
    torch.manual_seed(0)
    return HydraLM(**(SIZES | {"small_gate": 0.5} | more)).eval()


def ids(length=19, batch=2):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(0))


def test_without_the_other_gates_it_is_a_stack_of_mamba():
    model = build(small_gate=0.0)
    plain = MambaLM(16, 4, 40, ssm={"d_state": 4}).eval()
    state = {k.replace(".ssm.", ".mixer."): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), plain(ids()))
        for block in model.layers:
            block.gates.zero_()
        torch.testing.assert_close(model(ids()), model.head(model.norm_f(model.embed(ids()))))


@pytest.mark.parametrize(
    "more", [{}, {"experts": 0}, {"slots": 0}, {"attention_every": 0}, {"summary": "last"}, {"layer": "Mamba2", "ssm":
             {"d_state": 8, "headdim": 8}}]
)  # fmt: skip
def test_causal(more):
    model = build(**more)
    for at in (8, 9, 11, 12):  # around a chunk's border
        other = ids()
        other[:, at] = (other[:, at] + 1) % 40
        with torch.no_grad():
            a, b = model(ids()), model(other)
        torch.testing.assert_close(a[:, :at], b[:, :at], rtol=1e-5, atol=1e-6)
        assert (a[:, at:] - b[:, at:]).abs().max() > 1e-4


def test_routing_by_the_own_chunk_looks_ahead():
    other = ids()
    other[:, 11] = (other[:, 11] + 1) % 40
    model = build(routing="current", experts=8, top_k=1, small_gate=5.0)
    with torch.no_grad():
        assert not torch.allclose(model(ids())[:, :11], model(other)[:, :11])


@pytest.mark.parametrize("summary", ["mean", "last"])
def test_sparse_attention_by_hand(summary):
    torch.manual_seed(0)
    part = SparseGlobalAttention(8, 2, window=3, chunk=4, summary=summary)
    x = torch.randn(1, 14, 8)
    q, k, v = (getattr(part, f"{n}_proj")(x).unflatten(-1, (2, 4)) for n in "qkv")
    q, k = (rotary(t, torch.arange(14)[None], 4) for t in (q, k))
    expected = torch.zeros(14, 2, 4)
    for i in range(14):
        tokens = sorted({0, *range(max(0, i - 2), i + 1)})
        chunks = [c for c in range(3) if c * 4 + 3 < i and c * 4 <= i - 3]
        for h in range(2):
            own = [slice(c * 4, c * 4 + 4) if summary == "mean" else slice(c * 4 + 3, c * 4 + 4) for c in chunks]
            keys = torch.stack([k[0, t, h] for t in tokens] + [k[0, s, h].mean(0) for s in own])
            values = torch.stack([v[0, t, h] for t in tokens] + [v[0, s, h].mean(0) for s in own])
            assert len(keys) <= 3 + 14 // 4 + 1
            expected[i, h] = (keys @ q[0, i, h] / 2).softmax(0) @ values
    torch.testing.assert_close(part(x)[0], part.o_proj(expected.flatten(1)))


def test_a_wide_window_is_full_attention():
    torch.manual_seed(0)
    part = SparseGlobalAttention(8, 2, window=14, chunk=4)
    x = torch.randn(2, 14, 8)
    q, k, v = (getattr(part, f"{n}_proj")(x).unflatten(-1, (2, 4)) for n in "qkv")
    q, k = (rotary(t, torch.arange(14)[None], 4) for t in (q, k))
    full = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(part(x), part.o_proj(full.transpose(1, 2).flatten(2)))


def test_experts_by_hand():
    torch.manual_seed(0)
    part = ChunkExperts(8, 12, experts=4, top_k=2, chunk=5)
    x = torch.randn(2, 13, 8)
    y, logits = part(x)
    sources = [x[:, 0], x[:, :5].mean(1), x[:, 5:10].mean(1)]
    torch.testing.assert_close(logits, torch.stack([part.router(s) for s in sources], dim=1))
    for b in range(2):
        for c in range(3):
            p, which = logits[b, c].softmax(0).topk(2)
            tokens = x[b, c * 5 : c * 5 + 5]
            own = sum(w / p.sum() * part.experts[int(e)](tokens) for w, e in zip(p, which, strict=True))
            torch.testing.assert_close(y[b, c * 5 : c * 5 + 5], own)
    own = ChunkExperts(8, 12, chunk=5, routing="current").route(x)
    assert own.shape == (2, 3, 8)
    single = ChunkExperts(8, 12, experts=1, top_k=1, chunk=5)
    dense = SwiGLU(8, 12)
    dense.load_state_dict(single.experts[0].state_dict())
    torch.testing.assert_close(single(x)[0], dense(x))


def test_balancing_losses():
    part = ChunkExperts(8, 12, experts=4, top_k=1, chunk=5)
    even = torch.eye(4).repeat(2, 1)[None] * 1e-4  # each expert chosen equally often, nearly even probabilities
    balance, z = part.losses(even)
    assert balance.item() == pytest.approx(1, abs=1e-3)
    assert z.item() == pytest.approx(torch.tensor(4.0).log().item() ** 2, rel=1e-3)
    one_sided = torch.tensor([9.0, 0, 0, 0]).repeat(1, 8, 1)
    assert part.losses(one_sided)[0].item() == pytest.approx(4, rel=0.01)


def test_workspace_streams():
    torch.manual_seed(0)
    part = Workspace(8, slots=3, chunk=4)
    x = torch.randn(2, 14, 8)
    whole, end = part(x)
    slots, found = None, []
    for start in range(0, 14, 4):
        y, slots = part(x[:, start : start + 4], slots)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, dim=1), whole)
    torch.testing.assert_close(slots, end)
    torch.testing.assert_close(part(x[:, :12])[1], end)  # a chunk that is not finished writes nothing
    assert end.shape == (2, 3, 8)


def test_product_keys_are_the_best_of_all_pairs():
    torch.manual_seed(0)
    part = ProductKeys(8, keys=7, heads=2, top_k=5, d_key=4)
    x = torch.randn(1, 3, 8)
    score, place = part.select(x)
    q = part.norm(part.query(x).unflatten(-1, (2, -1)))
    pairs = [torch.einsum("blhd,hkd->blhk", q[..., s], part.half_keys[t]) for t, s in ((0, slice(2)), (1, slice(2, 4)))]
    every = (pairs[0][..., :, None] + pairs[1][..., None, :]).flatten(-2)
    best, at = every.topk(5, dim=-1)
    torch.testing.assert_close(score, best)
    assert torch.equal(place, at)
    expected = sum((best[:, :, h].softmax(-1)[..., None] * part.values(at[:, :, h])).sum(2) for h in range(2))
    torch.testing.assert_close(part(x), expected)


def test_training_loss_and_statistics():
    model = build().train()
    x = ids()
    loss = model.training_loss(x)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        plain = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        own = [b.moe.losses(r) for b, r in zip(model.layers, model.routed(x)[1], strict=True)]
        torch.testing.assert_close(loss, plain + sum(1e-2 * b + 1e-3 * z for b, z in own))
    found = model.statistics(x)
    assert found["experts"].shape == (4, 2, 5, 2)
    assert 0 < int(found["values"][0]) <= min(36, 2 * 19 * 2 * 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"layer": "S4"}, "layer is 'S4'"),
        ({"top_k": 4}, "top_k is 4"),
        ({"routing": "next"}, "routing is 'next'"),
        ({"summary": "sum"}, "summary is 'sum'"),
        ({"heads": 3}, "does not divide"),
        ({"memory_layers": [4]}, "memory_layers"),
        ({"slots": -1}, "0 \\(without that part\\)"),
    ],
)
def test_what_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        build(**more)
