"""S5 with resets: every flag against the definition, the parallel form against steps, the original's format."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo_rl.s5_rl import S5ActorCritic, S5Stack, Unrolled, arguments_of, reset_marks

H, P, LAYERS = 6, 4, 2


def original_state(activation="full_glu", norm=False):
    """A state dict under the original's keys; weights of layers small enough that norms matter."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    state = {}
    for i in range(LAYERS):
        state |= {
            f"layers_{i}/seq/Lambda_re": -torch.rand(P, generator=g) + 0.05,  # some positive, for clip_eigs
            f"layers_{i}/seq/Lambda_im": r(P) * 3,
            f"layers_{i}/seq/B": r(P, H, 2),
            f"layers_{i}/seq/C": r(H, P, 2),
            f"layers_{i}/seq/D": r(H),
            f"layers_{i}/seq/log_step": r(P, 1) - 1,
        }
        for out in {"full_glu": ("out1", "out2"), "gelu": ()}.get(activation, ("out2",)):
            state |= {f"layers_{i}/{out}/kernel": r(H, H), f"layers_{i}/{out}/bias": r(H)}
        if norm:
            state |= {f"layers_{i}/norm/scale": r(H), f"layers_{i}/norm/bias": r(H)}
    return state


def definition(state, x, resets, hidden, *, activation, do_norm, prenorm, do_gtrxl_norm, conj_sym, clip_eigs, method):
    """The original in words: one step after the other, in float64; x (batch, steps, H)."""
    state = {k: v.double() for k, v in state.items()}
    x = x.double()
    for i in range(LAYERS):
        p = {k.removeprefix(f"layers_{i}/"): v for k, v in state.items() if k.startswith(f"layers_{i}/")}

        def norm(h, p=p):
            return F.layer_norm(h, (H,), p["norm/scale"], p["norm/bias"], eps=1e-6)

        re = p["seq/Lambda_re"].clamp(max=-1e-4) if clip_eigs else p["seq/Lambda_re"]
        Lambda = torch.complex(re, p["seq/Lambda_im"])
        B, C = torch.view_as_complex(p["seq/B"]), torch.view_as_complex(p["seq/C"])
        dt = p["seq/log_step"][:, 0].exp()
        if method == "zoh":
            A = torch.exp(Lambda * dt)
            Bbar = ((A - 1) / Lambda)[:, None] * B
        else:
            A = (1 + dt / 2 * Lambda) / (1 - dt / 2 * Lambda)
            Bbar = (dt / (1 - dt / 2 * Lambda))[:, None] * B
        skip = x
        u = norm(x) if prenorm and do_norm else x
        s, ys = hidden[i].to(torch.complex128), []
        for t in range(x.shape[1]):
            s = torch.where(resets[:, t, None], torch.zeros_like(s), s)
            s = A * s + u[:, t].to(torch.complex128) @ Bbar.T
            y = (s @ C.T).real
            ys.append((2 * y if conj_sym else y) + p["seq/D"] * u[:, t])
        y = torch.stack(ys, 1)
        y = norm(y) if do_gtrxl_norm else y
        g = F.gelu(y, approximate="tanh")

        def dense(name, h, p=p):
            return h @ p[f"{name}/kernel"] + p[f"{name}/bias"]

        if activation == "full_glu":
            y = dense("out1", g) * torch.sigmoid(dense("out2", g))
        elif activation == "half_glu1":
            y = g * torch.sigmoid(dense("out2", g))
        elif activation == "half_glu2":
            y = y * torch.sigmoid(dense("out2", g))
        else:
            y = g
        x = skip + y
        x = norm(x) if do_norm and not prenorm else x
    return x


FLAGS = [
    *({"activation": a} for a in ("full_glu", "half_glu1", "half_glu2", "gelu")),
    *(
        {"do_norm": a, "prenorm": b, "do_gtrxl_norm": c}
        for a, b, c in itertools.product([False, True], repeat=3)
        if a or c
    ),
    {"conj_sym": False},
    {"clip_eigs": True},
    {"discretization": "bilinear"},
    {"activation": "half_glu2", "do_norm": True, "prenorm": True, "do_gtrxl_norm": True, "discretization": "bilinear"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_every_flag_is_the_definition(flags):
    config = {
        "d_model": H, "ssm_size": 2 * P, "blocks": 1, "C_init": "lecun_normal", "discretization": "zoh",
        "conj_sym": True, "clip_eigs": False, "activation": "full_glu", "do_norm": False, "prenorm": False,
        "do_gtrxl_norm": False, "n_layers": LAYERS, "P": P, **flags,
    }  # fmt: skip
    state = original_state(config["activation"], config["do_norm"] or config["do_gtrxl_norm"])
    adapter = zoo.reference("s5_rl")
    model = adapter.build(config, state)
    torch.manual_seed(1)
    x, hidden = torch.randn(9, 3, H), [torch.randn(1, 3, P, dtype=torch.complex64) for _ in range(LAYERS)]
    resets = (torch.rand(9, 3) < 0.3).float()
    inputs = {"x": x, "resets": resets} | {f"hidden{i}": h for i, h in enumerate(hidden)}
    with torch.no_grad():
        found = adapter.run(model, inputs)
    names = ("activation", "do_norm", "prenorm", "do_gtrxl_norm", "conj_sym", "clip_eigs")
    wanted = definition(
        state, x.transpose(0, 1), resets.transpose(0, 1) > 0, [h[0] for h in hidden],
        method=config["discretization"], **{k: config[k] for k in names},
    )  # fmt: skip
    for name in ("y", "y_stepwise"):
        error = (found[name].transpose(0, 1) - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, f"{name}: {error}"
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def agent(**more):
    torch.manual_seed(0)
    return S5ActorCritic(5, 3, d_model=16, ssm_size=16, n_layers=2, encoder_dim=12, body_dim=8, **more).eval()


@pytest.mark.parametrize("continuous", [False, True])
def test_whole_trajectories_equal_steps(continuous):
    model = agent(continuous=continuous, C_init="trunc_standard_normal")
    obs, resets = torch.randn(4, 30, 5), torch.rand(4, 30) < 0.2
    start = [{"ssm": torch.randn_like(s["ssm"])} for s in model.init_state(4)]
    whole_state, step_state = ([{"ssm": s["ssm"].clone()} for s in start] for _ in range(2))
    with torch.no_grad():
        whole = model(obs, resets, state=whole_state)
        steps = [model.step(obs[:, t], step_state, resets[:, t]) for t in range(30)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([s[name] for s in steps], 1), value, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole_state, step_state, strict=True):
        torch.testing.assert_close(a["ssm"], b["ssm"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conj_sym", [True, False])
def test_unrolled_steps_are_steps(conj_sym):
    model = agent(C_init="trunc_standard_normal", conj_sym=conj_sym, do_norm=True, prenorm=True)
    obs, resets = torch.randn(3, 20, 5), torch.rand(3, 20) < 0.2
    a, b = model.init_state(3), model.init_state(3)
    fast = Unrolled(model)
    with torch.no_grad():
        for t in range(20):
            wanted, found = model.step(obs[:, t], a, resets[:, t]), fast.step(obs[:, t], b, resets[:, t])
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("continuous", [False, True])
def test_the_originals_agent_both_ways(continuous):
    adapter = zoo.reference("s5_rl")
    first = agent(continuous=continuous, C_init="trunc_standard_normal")
    if continuous:
        torch.nn.init.normal_(first.log_std)
    state = adapter.to_reference(first.state_dict(), model=first)
    assert {"encoder_0/kernel", "s5/layers_1/out2/bias", "value_decoder/bias"} <= state.keys()
    assert ("log_std" in state) == continuous
    assert state["encoder_0/kernel"].shape == (5, 12)
    config = {"d_model": 16, "ssm_size": 16, "blocks": 1, "n_layers": 2, "continuous": continuous, "obs_dim": 5,
              "action_dim": 3, "P": 8, "C_init": "trunc_standard_normal"}  # fmt: skip
    again = adapter.build(config, state)
    obs, dones = torch.randn(7, 2, 5), (torch.rand(7, 2) < 0.3).float()
    hidden = {f"hidden{i}": torch.randn(1, 2, 8, dtype=torch.complex64) for i in range(2)}
    with torch.no_grad():
        found = adapter.run(again, {"obs": obs, "dones": dones, **hidden})
        kept = [{"ssm": h[0].clone()} for h in hidden.values()]
        wanted = first(obs.transpose(0, 1), dones.transpose(0, 1), state=kept)
    assert found["value"].shape == (7, 2)
    assert found["hidden1"].shape == (1, 2, 8)
    torch.testing.assert_close(found["hidden1"][0], kept[1]["ssm"])
    for name, value in wanted.items():
        if name != "std":
            torch.testing.assert_close(found[name].transpose(0, 1), value)
    if continuous:  # the original's scale is one vector
        torch.testing.assert_close(found["scale"], first.log_std.detach().exp())
    ignoring = adapter.build({**config, "NO_RESET": True}, state)
    with torch.no_grad():
        never = adapter.run(again, {"obs": obs, "dones": torch.zeros(7, 2), **hidden})["value"]
        torch.testing.assert_close(adapter.run(ignoring, {"obs": obs, "dones": dones, **hidden})["value"], never)


def test_a_reset_forgets_everything():
    model = agent(C_init="trunc_standard_normal")
    obs, other = torch.randn(1, 12, 5), torch.randn(1, 12, 5)
    other[:, 7:] = obs[:, 7:]
    resets = torch.zeros(1, 12, dtype=torch.bool)
    with torch.no_grad():
        assert not torch.allclose(model(obs, resets)["logits"][:, 7:], model(other, resets)["logits"][:, 7:])
        resets[:, 7] = True
        torch.testing.assert_close(model(obs, resets)["logits"][:, 7:], model(other, resets)["logits"][:, 7:])
        # the same as a trajectory of its own
        torch.testing.assert_close(model(obs, resets)["logits"][:, 7:], model(obs[:, 7:])["logits"])
        ignored = agent(C_init="trunc_standard_normal", no_reset=True)
        torch.testing.assert_close(ignored(obs, resets)["logits"], model(obs)["logits"])


def test_pieces_with_a_state_equal_the_whole():
    model = agent(C_init="trunc_standard_normal")
    obs, resets = torch.randn(2, 20, 5), torch.rand(2, 20) < 0.2
    state = model.init_state(2)
    with torch.no_grad():
        parts = [model(obs[:, a:b], resets[:, a:b], state=state)["value"] for a, b in ((0, 6), (6, 7), (7, 20))]
        torch.testing.assert_close(torch.cat(parts, 1), model(obs, resets)["value"], rtol=1e-4, atol=1e-6)


def test_marks_of_resets():
    dones = torch.tensor([[0, 1, 0, 0, 1]])
    assert reset_marks(dones).tolist() == [[True, False, True, False, False]]
    assert reset_marks(dones, first=False).tolist() == [[False, False, True, False, False]]


def test_new_models_have_the_originals_sizes():
    """Orthogonal dense layers; B of variance 1 / ssm_size and, with lecun_normal, C of 1 / (ssm_size H)."""
    torch.manual_seed(0)
    model = S5ActorCritic(10, 4, d_model=128, ssm_size=64, n_layers=1, encoder_dim=64)
    w = model.encoder[1].weight
    torch.testing.assert_close(w.T @ w, 2 * torch.eye(64), rtol=1e-4, atol=1e-4)
    seq = model.s5.layers[0].seq
    # each complex state stands for a pair, so |V^H b|^2 keeps the whole power
    assert seq.B.pow(2).sum(-1).mean().item() == pytest.approx(1 / 64, rel=0.1)
    assert seq.C.pow(2).sum(-1).mean().item() == pytest.approx(2 / (64 * 128), rel=0.1)
    torch.testing.assert_close(seq.Lambda_re, torch.full((32,), -0.5), rtol=1e-5, atol=1e-5)


def test_bad_input():
    model = agent()
    with pytest.raises(ValueError, match=r"obs has shape \(2, 7, 4\); expected \(batch, steps, 5\)"):
        model(torch.zeros(2, 7, 4))
    with pytest.raises(ValueError, match="resets has shape"):
        model(torch.zeros(2, 7, 5), torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"obs has shape \(2, 4\)"):
        model.step(torch.zeros(2, 4), model.init_state(2))
    with pytest.raises(ValueError, match="action_dim is 0"):
        S5ActorCritic(5, 0)
    config = {"d_model": 16, "ssm_size": 16, "n_layers": 1}
    with pytest.raises(ValueError, match="blocks is 2"):
        arguments_of({**config, "blocks": 2})
    with pytest.raises(ValueError, match="bidirectional"):
        arguments_of({**config, "bidirectional": True})
    with pytest.raises(ValueError, match="no configuration key 'd_modle'"):
        arguments_of({**config, "d_modle": 16})


def test_script_spelling():
    found = arguments_of({"S5_D_MODEL": 256, "S5_SSM_SIZE": 256, "S5_N_LAYERS": 4, "S5_DO_NORM": True})
    assert found == {"d_model": 256, "ssm_size": 256, "n_layers": 4, "do_norm": True}


def test_a_silent_stack_has_the_class_s_defaults():
    found = arguments_of({"d_model": 8, "ssm_size": 8, "n_layers": 1, "prenorm": False}, stack=True)
    silent = {"activation": "gelu", "do_norm": True, "do_gtrxl_norm": True}
    assert found == {"d_model": 8, "ssm_size": 8, "n_layers": 1, "prenorm": False, **silent}


def test_stack_alone():
    stack = S5Stack(8, 8, 1)
    assert stack(torch.randn(2, 5, 8)).shape == (2, 5, 8)
