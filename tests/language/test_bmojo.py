"""B'MOJO: the joint softmax, each recurrence against its definition, the eidetic memory, decoding."""

import pytest
import torch
import torch.nn.functional as F

import zoo.testing
from zoo_language.bmojo import BMojoLayer, Eidetic, phases
from zoo_language.bmojo_lm import BMojoLM, layer_arguments
from zoo_language.bmojo_ssm import GatedKalmaNet, gated_delta_rule, rotate

W = 4


def layer(**more):
    torch.manual_seed(0)
    arguments = {"d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "window": W} | more
    made = BMojoLayer(**arguments).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(length=19, batch=2, seed=0):
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turn(length, start=0):
    return phases(torch.arange(start, start + length)[None], 6, 10000.0)


def by_hand(made, x, kept=None):
    """One softmax a query and head, written out."""
    around = tuple(t.double() for t in turn(x.shape[1]))
    faded = None if made.ssm is None else made.ssm(x, turn(x.shape[1]))
    near, far = made.project(x, faded, around)
    out = torch.zeros(*x.shape[:2], made.heads, made.head_dim, dtype=x.dtype)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for h in range(made.heads):
                g = h // (made.heads // made.kv_heads)
                pairs = [(near[0], near[1], near[2], j) for j in range(max(0, i - W + 1), i + 1)]
                if far:
                    pairs += [(far[0], far[1], far[2], j) for j in range(max(0, i - 2 * W + 1), i - W + 1)]
                if kept is not None:
                    window = kept[b, i // W]
                    pairs += [(near[0], near[1], near[2], int(j)) for j in window if 0 <= j <= i - W]
                scores = torch.stack([(q[b, i, h] @ k[b, j, g]) * made.scale for q, k, _, j in pairs])
                values = torch.stack([v[b, j, g] for _, _, v, j in pairs])
                out[b, i, h] = scores.softmax(0) @ values
    return made.o_proj(out.flatten(-2))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie": False},
        {"qk_norm": False, "qkv_bias": True, "o_bias": True},
        {"ssm_config": {"bc_norm": False, "bc_rotary": True}},
        {"ssm": "gdn"},
        {"ssm": "gka", "tie": False},
        {"fading": False},
        {"eidetic": 3},
        {"eidetic": 2, "fading": False},
    ],
    ids=str,
)
def test_one_softmax_over_all_memories_and_decoding(more):
    made = layer(**more)
    x = tokens()
    with torch.no_grad():
        kept = None
        if made.eidetic is not None:
            kept = made.eidetic.kept(made.eidetic.surprise(made.ssm(x, turn(19))))
        whole = made(x, turn(19))
        torch.testing.assert_close(whole, by_hand(made, x, kept), rtol=1e-5, atol=1e-6)
        # In pieces, the second row shorter at first: each goes on from its own end.
        state = {k: v.double() if v.is_floating_point() else v for k, v in made.init_state(2).items()}
        zero = torch.zeros(2, dtype=torch.long)
        made(x[:, :9], turn(9), state=state, position=zero, lengths=torch.tensor([9, 6]))
        position = torch.tensor([9, 6])
        for _ in range(10):
            row = torch.arange(2)
            at = phases(position[:, None], 6, 10000.0)
            found = made(x[row, position][:, None], at, state=state, position=position)
            torch.testing.assert_close(found[:, 0], whole[row, position], rtol=1e-5, atol=1e-6)
            position = position + 1


def test_the_first_window_is_sliding_window_attention():
    made, plain = layer(), layer(fading=False)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("ssm.")})
    x = tokens()
    with torch.no_grad():
        a, b = made(x, turn(19)), plain(x, turn(19))
    torch.testing.assert_close(a[:, :W], b[:, :W])
    assert (a[:, W:] - b[:, W:]).abs().max() > 1e-3


@pytest.mark.parametrize("eidetic", [0, 3])
def test_causal(eidetic):
    made = layer(eidetic=eidetic)
    x = tokens()
    other = x.clone()
    other[:, 12] += 1
    with torch.no_grad():
        a, b = made(x, turn(19)), made(other, turn(19))
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3


def test_old_tokens_act_through_the_recurrence_alone():
    made = layer()
    with torch.no_grad():
        made.ssm.out_proj.weight.zero_()  # fading values are nothing, yet take their share of the softmax
    x = tokens()
    other = x.clone()
    other[:, 0] += 1
    with torch.no_grad():
        a, b = made(x, turn(19)), made(other, turn(19))
    torch.testing.assert_close(a[:, W:], b[:, W:])
    plain = layer(fading=False)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("ssm.")})
    with torch.no_grad():
        assert (plain(x, turn(19)) - a)[:, W:].abs().max() > 1e-3


def test_eidetic_memory_keeps_the_most_surprising():
    random = torch.Generator().manual_seed(3)
    surprise = torch.rand(2, 22, generator=random)
    surprise[0, 5] = surprise[0, 9] = 2.0  # equals: the later one first
    kept = Eidetic(3, W).kept(surprise)
    for b in range(2):
        for c in range(kept.shape[1]):
            seen = sorted(range(c * W), key=lambda j: (-float(surprise[b, j]), -j))[:3]
            assert sorted(kept[b, c].tolist()) == sorted(seen + [-1] * (3 - len(seen)))
    rows = torch.zeros(1, 6, 2)
    rows[0, 2] = torch.tensor([3.0, 4.0])
    found = Eidetic(3, W).surprise(rows)[0]
    torch.testing.assert_close(found, torch.tensor([0, 0, 25.0, 25 / 16, 25 / 16, 25 / 16]))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_delta_rule_is_its_recurrence(chunk):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, 3, 4, dtype=torch.float64, generator=random) for _ in range(3))
    k = F.normalize(k, dim=-1)
    g = -torch.rand(2, 11, 3, dtype=torch.float64, generator=random)
    beta = torch.rand(2, 11, 3, dtype=torch.float64, generator=random)
    S = start = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=random)
    y, end = gated_delta_rule(q, k, v, g, beta, start, chunk)
    for t in range(11):
        S = g[:, t].exp()[..., None, None] * S
        change = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhpv,bhp->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * change[:, :, None]
        torch.testing.assert_close(y[:, t], torch.einsum("bhpv,bhp->bhv", S, q[:, t]))
    torch.testing.assert_close(end, S)


def test_kalmanet_nears_the_ridge_regression():
    torch.manual_seed(0)
    net = GatedKalmaNet(16, 4, 2, 6, num_iter=30).double()
    k = F.normalize(torch.randn(1, 40, 4, 6, dtype=torch.float64), dim=-1)
    q = F.normalize(torch.randn(1, 40, 4, 6, dtype=torch.float64), dim=-1)
    g = torch.full((1, 40, 4), -0.1, dtype=torch.float64)
    found, G = net._solve(q, k, g, None)
    ridge = 0.02 * torch.linalg.matrix_norm(G)[..., None, None] * torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(G + ridge, q[:, -1])
    assert (found[:, -1] - exact).norm() / exact.norm() < 2e-3
    net.num_iter = 200
    found, _ = net._solve(q, k, g, None)
    torch.testing.assert_close(found[:, -1], exact)


@pytest.mark.parametrize(
    "flags",
    [
        {"use_beta_gate": False}, {"use_alpha_connection": False}, {"use_v_conv": False}, {"num_iter": 0},
        {"use_forgetting_gate": False}, {"use_forgetting_gate_kk": False}, {"gla_rescale": False}, {"use_gate": False},
        {"kv_proj_rank": 3}, {"kv_proj_rank": 3, "kv_learnable_residual": True}, {"bp_lambda": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_switch_of_kalmanet_changes_the_output(flags):
    torch.manual_seed(0)
    plain, made = GatedKalmaNet(16, 4, 2, 6).eval(), GatedKalmaNet(16, 4, 2, 6, **flags).eval()
    made.load_state_dict({k: v for k, v in plain.state_dict().items() if k in made.state_dict()}, strict=False)
    x = torch.randn(1, 9, 16)
    expanded = "kv_proj_rank" in flags
    if expanded:
        with torch.no_grad():
            torch.testing.assert_close(made(x), plain(x))  # its B is zero at first
            made.proj_k.linearB.weight.normal_()
    with torch.no_grad():
        assert torch.allclose(made(x), plain(x)) == ("bp_lambda" in flags)
    made(x).square().sum().backward()
    unused = () if flags.get("use_forgetting_gate", True) else ("A_log", "dt_bias", "a_proj")
    unused += () if flags.get("num_iter", 1) else ("alpha_proj",)
    assert not [n for n, p in made.named_parameters() if p.grad is None and not n.startswith(unused or "-")]


def test_language_model_generates_with_the_shared_engine():
    from zoo_language.generation import generate

    torch.manual_seed(0)
    model = BMojoLM(16, 2, 40, 4, 2, 6, 24, bmojo_layers=[1], window=3, ssm="gdn", eidetic=2).eval()
    prompt = [3, 9, 12, 30, 2, 2, 7]
    texts, state = generate(model, [prompt], max_new_tokens=9)
    ids = list(prompt)
    for token in texts[0].tokens:
        with torch.no_grad():
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert {v.shape[1] for k, v in state.layers[1].items() if k in ("k", "far_k", "eidetic_k")} == {3, 6, 2}


def test_rotation_is_by_halves():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = rotate(x, (torch.zeros(1, 1, 4), torch.ones(1, 1, 4)))  # a quarter turn
    assert turned.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bmojo_config": {"ssm_mixer": "s4"}}, "ssm_mixer is 's4'"),
        ({"bmojo_config": {"tokens": 3}}, "bmojo_config has no key tokens"),
        ({"mamba2_config": {"d_state": 3}}, "mamba2_config has no key d_state"),
        ({"gate": 1}, "no configuration key gate"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_what_is_refused(change, said):
    config = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "bmojo_config": {}}
    with pytest.raises(ValueError, match=said):
        zoo.reference("bmojo").build(config | change, {})


def test_the_mixer_may_be_named_in_capitals():
    """As the original reads it."""
    config = {"hidden_size": 16, "num_attention_heads": 4, "bmojo_config": {"ssm_mixer": "Gated_KalmaNet"}}
    assert layer_arguments(config)["ssm"] == "gka"


def test_recomputing_layers_of_ragged_texts_keeps_their_ends():
    ids, lengths = torch.randint(40, (2, 9)), torch.tensor([4, 9])
    found = []
    for recompute in (False, True):
        model = zoo.testing.case("bmojo_eidetic_base").build().train()
        model.set_grad_checkpointing(recompute)
        model(ids, lengths=lengths).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
