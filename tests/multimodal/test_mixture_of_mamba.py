"""Mixture-of-Mamba: parity with the original, its switches and quirks, and the properties that routing must have."""

from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.layers import Mamba
from zoo.reference import read_golden
from zoo_multimodal.mixture_of_mamba import PROJECTIONS, MixtureOfMamba
from zoo_multimodal.routing import RoutedLinear, experts_of, route

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["two_modalities", "dense"])
def test_parity_with_gradients(name):
    path = GOLDEN / f"mixture_of_mamba__{name}.safetensors"
    found = zoo.testing.check_golden(path, grad=True, tolerance=1e-5, grad_tolerance=1e-5)
    assert "grad/input" in found


def block(m=2, seed=0, **more):
    torch.manual_seed(seed)
    return MixtureOfMamba(16, m, d_state=4, **more).eval()


def inputs(m=2, batch=2, length=13, seed=1):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, length, 16, generator=generator)
    return u, torch.randint(0, m, (batch, length), generator=generator)


def by_hand(model, u, kinds):
    """Every expert on every token, then chosen; the recurrence step by step: the definition, term by term."""

    def sel(name, x):
        layer = getattr(model, name)
        if not isinstance(layer, RoutedLinear):
            bias = None if name == "dt_proj" else layer.bias  # the original never adds a shared dt_proj's
            return torch.nn.functional.linear(x, layer.weight, bias)
        every = torch.stack([torch.nn.functional.linear(x, e.weight, e.bias) for e in layer])
        return torch.gather(every, 0, kinds[None, ..., None].expand(1, *kinds.shape, every.shape[-1]))[0]

    x, z = sel("in_proj", u).chunk(2, -1)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (model.d_conv - 1, 0))
    x = torch.nn.functional.conv1d(padded, model.conv1d.weight, model.conv1d.bias, groups=x.shape[-1]).transpose(1, 2)
    x = torch.nn.functional.silu(x)
    low, B, C = sel("x_proj", x).split([model.dt_rank, model.d_state, model.d_state], -1)
    dt = torch.nn.functional.softplus(sel("dt_proj", low))
    A, h, rows = -model.A_log.exp(), x.new_zeros(x.shape[0], x.shape[2], model.d_state), []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        rows.append((h * C[:, t, None]).sum(-1) + model.D * x[:, t])
    return sel("out_proj", torch.stack(rows, 1) * torch.nn.functional.silu(z))


SPLITS = [PROJECTIONS, (), *((p,) for p in PROJECTIONS), tuple(p for p in PROJECTIONS if p != "dt_proj")]


@pytest.mark.parametrize("split", SPLITS, ids="+".join)
@pytest.mark.parametrize("bias", [False, True])
def test_every_switch_is_the_definition(split, bias):
    model = block(3, split=split, bias=bias)
    u, kinds = inputs(3)
    with torch.no_grad():
        zoo.testing.assert_close(model(u, kinds), by_hand(model, u, kinds), tolerance=1e-5, what=str(split))


@pytest.mark.parametrize("split", SPLITS, ids="+".join)
def test_the_originals_keys_both_ways(split):
    """The switches by their original names, with keys that come from our own model."""
    adapter = zoo.reference("mixture_of_mamba")
    model = block(2, split=split)
    state = adapter.to_reference(model.state_dict(), model=model)
    assert any(k.startswith("local_experts_") for k in state) == bool(split)
    args = {"n_modalities": 2} | {f"do_not_split_{p}": p not in split for p in PROJECTIONS}
    config = {"args": args, "d_model": 16, "d_state": 4}
    again = adapter.build(config, state, source="x@y MixtureOfMamba.py:MixtureOfMamba")
    u, kinds = inputs()
    masks = torch.stack([kinds.flatten() == m for m in range(2)])
    with torch.no_grad():
        assert torch.equal(adapter.run(again, {"hidden_states": u, "modality_masks": masks})["y"], model(u, kinds))
    assert isinstance(adapter.build(config, state), MixtureOfMamba)  # without a source, too


def test_all_shared_still_drops_the_bias():
    """With all four switches the keys are the dense baseline's, but not the numbers: the class says which it is."""
    golden = read_golden(GOLDEN / "mixture_of_mamba__dense.safetensors")
    adapter = zoo.reference("mixture_of_mamba")
    args = {"n_modalities": 1} | {f"do_not_split_{p}": True for p in PROJECTIONS}
    shared = adapter.build({**golden.config, "args": args}, golden.state, source="x:MixtureOfMamba")
    u = golden.inputs["hidden_states"]
    with torch.no_grad():
        y = shared(u)
        assert not torch.allclose(y, golden.outputs["y"], atol=1e-3)
        shared.dt_proj.bias.fill_(7.0)
        assert torch.equal(shared(u), y)


def test_adapter_refuses():
    adapter = zoo.reference("mixture_of_mamba")
    with pytest.raises(ValueError, match="has no argument 'heads'"):
        adapter.build({"d_model": 16, "heads": 2, "args": {"n_modalities": 1}}, {})
    with pytest.raises(ValueError, match="do_not_split_conv"):
        adapter.build({"d_model": 16, "args": {"do_not_split_conv": True}}, {})
    with pytest.raises(ValueError, match="no n_modalities"):
        adapter.build({"d_model": 16, "args": {}}, {}, source="x:MixtureOfMamba")
    with pytest.raises(ValueError, match="names the class 'Other'"):
        adapter.build({"d_model": 16}, {}, source="x:Other")


# -- the sheet's properties


def test_causal():
    model, (u, kinds) = block(), inputs()
    other = u.clone()
    other[:, 8:] += 1
    with torch.no_grad():
        a, b = model(u, kinds), model(other, kinds)
    zoo.testing.assert_close(b[:, :8], a[:, :8], tolerance=1e-6)
    assert not torch.allclose(b[:, 8:], a[:, 8:])


def test_an_absent_modality_changes_nothing_and_gets_no_gradient():
    model, (u, kinds) = block(3), inputs(2)
    with torch.no_grad():
        before = model(u, kinds)
        for name in PROJECTIONS:
            for p in getattr(model, name)[2].parameters():
                p.add_(1.0)
        assert torch.equal(model(u, kinds), before)
    model(u, kinds).pow(2).mean().backward()
    for name, p in model.named_parameters():
        absent = ".2." in name
        assert (p.grad is None or not p.grad.any()) if absent else p.grad.any(), name


def test_experts_and_masks_permuted_together():
    model, (u, kinds) = block(3), inputs(3)
    order = [2, 0, 1]
    with torch.no_grad():
        before = model(u, kinds)
        other = block(3, seed=5)
        state = model.state_dict()
        for key in list(state):
            for name in PROJECTIONS:
                for new, old in enumerate(order):
                    if key.startswith(f"{name}.{old}."):
                        other.state_dict()[key.replace(f"{name}.{old}.", f"{name}.{new}.")].copy_(state[key])
        for name in ("A_log", "D", "conv1d.weight", "conv1d.bias"):
            other.state_dict()[name].copy_(state[name])
        zoo.testing.assert_close(other(u, torch.argsort(torch.tensor(order))[kinds]), before, tolerance=1e-6)


@pytest.mark.parametrize("m", [1, 3])
def test_equal_experts_are_mamba(m):
    model, (u, kinds) = block(m), inputs(m)
    single = Mamba(16, 4).eval()
    state = {k.replace(".0.", "."): v for k, v in model.state_dict().items() if ".1." not in k and ".2." not in k}
    single.load_state_dict(state)
    with torch.no_grad():
        for name in PROJECTIONS:
            for other in list(getattr(model, name))[1:]:
                other.load_state_dict(getattr(model, name)[0].state_dict())
        zoo.testing.assert_close(model(u, kinds), single(u), tolerance=1e-6)


def test_masks():
    """A token in several masks belongs to the lowest; masks, numbers and a routing say the same; gaps are refused."""
    model, (u, kinds) = block(2), inputs()
    masks = torch.stack([kinds.flatten() == m for m in range(2)])
    assert torch.equal(experts_of(masks), kinds.flatten())
    shared = masks.clone()
    shared[:, -1] = True
    first = kinds.clone()
    first[-1, -1] = 0
    with torch.no_grad():
        assert torch.equal(model(u, masks), model(u, kinds))
        assert torch.equal(model(u, masks.to(torch.uint8)), model(u, kinds))
        assert torch.equal(model(u, route(kinds, 2, kinds.numel())), model(u, kinds))
        assert torch.equal(model(u, shared), model(u, first))
    masks[:, 7] = False
    with pytest.raises(ValueError, match="token 7 belongs to no modality"):
        model(u, masks)
    for wrong, said in (
        (kinds + 2, "belongs to no modality"), (kinds[:, 1:], "one integer for each of 26 tokens"),
        (masks.t(), r"expected \(modalities, batch \* length\) = \(2, 26\)"), (None, "modality is missing"),
        (route(kinds[:1], 2, 13), "the routing is of 13 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model(u, wrong)
    with pytest.raises(ValueError, match="n_modalities is 0"):
        MixtureOfMamba(16, 0)
    with pytest.raises(ValueError, match="split names 'conv'"):
        MixtureOfMamba(16, 2, split=("conv",))


@pytest.mark.parametrize("split", [PROJECTIONS, ("in_proj", "out_proj")])
def test_steps_and_pieces_are_the_whole(split):
    model, (u, kinds) = block(2, split=split), inputs()
    with torch.no_grad():
        whole = model(u, kinds)
        state = model.init_state(2)
        steps = torch.stack([model.step(u[:, t], state, kinds[:, t]) for t in range(u.shape[1])], 1)
        zoo.testing.assert_close(steps, whole, tolerance=1e-5)
        state = model.init_state(2)
        pieces = [model(u[:, :5], kinds[:, :5], state=state), model(u[:, 5:], kinds[:, 5:], state=state)]
        zoo.testing.assert_close(torch.cat(pieces, 1), whole, tolerance=1e-5)


def test_lengths_and_resets():
    model, (u, kinds) = block(), inputs()
    with torch.no_grad():
        short = model(u, kinds, lengths=torch.tensor([9, 13]))
        zoo.testing.assert_close(short[0, :9], model(u[:1, :9], kinds[:1, :9])[0], tolerance=1e-5)
        resets = torch.zeros(2, 13, dtype=torch.bool)
        resets[:, 6] = True
        packed = model(u, kinds, resets=resets)
        zoo.testing.assert_close(packed[:, 6:], model(u[:, 6:], kinds[:, 6:]), tolerance=1e-5)


def test_paths_and_the_scan_alone():
    """Along a path it is the block on rows in that order; mix is what out_proj gets."""
    model, (u, kinds) = block(), inputs()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        zoo.testing.assert_close(
            model(u, kinds, path=order)[:, order], model(u[:, order], kinds[:, order]), tolerance=1e-5
        )
        back = model(u.flip(1), kinds.flip(1)).flip(1)
        zoo.testing.assert_close(model(u, kinds, reverse=True), back, tolerance=1e-5)
        routing = route(kinds, 2, kinds.numel())
        y, z = model.mix(u, routing)
        assert torch.equal(model.out_proj(y, routing), model(u, kinds))
        bare, _ = model.mix(u, routing, gate=False)
        zoo.testing.assert_close(bare * torch.nn.functional.silu(z), y, tolerance=1e-5)


# -- the product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kinds", ["012", "0", "02", ""])
def test_routed_linear_and_its_gradients(kinds, bias):
    torch.manual_seed(0)
    layer = RoutedLinear(3, 4, 5, bias=bias, dtype=torch.float64)
    numbers = torch.tensor([int(k) for k in kinds * 3], dtype=torch.long)
    x = torch.randn(len(numbers), 4, dtype=torch.float64, requires_grad=True)
    routing = route(numbers, 3, len(numbers))
    if len(numbers):
        assert torch.autograd.gradcheck(lambda x, *_: layer(x, routing), (x, *layer.parameters()))
    wanted = (
        torch.stack([layer[int(k)](row) for k, row in zip(numbers, x, strict=True)]) if kinds else x.new_empty(0, 5)
    )
    torch.testing.assert_close(layer(x, routing), wanted)


def test_operators_are_sound():
    layer = RoutedLinear(2, 4, 5, bias=True)
    kinds = torch.tensor([0, 1, 1, 0])
    routing = route(kinds, 2, 4)
    torch.library.opcheck(torch.ops.zoo_multimodal.route.default, (kinds, 2))
    weights, biases = [e.weight for e in layer], [e.bias for e in layer]
    x = torch.randn(4, 4, requires_grad=True)
    arguments = (x, weights, biases, routing.order, routing.bounds)
    torch.library.opcheck(torch.ops.zoo_multimodal.routed_linear.default, arguments)


def test_autocast_and_training_under_compile():
    model, (u, kinds) = block(), inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(u, kinds)
    with torch.no_grad():
        zoo.testing.assert_close(half.float(), model(u, kinds), tolerance=3e-2)
    model(u, kinds).pow(2).sum().backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(u, kinds).pow(2).sum().backward()
    for name, p in model.named_parameters():
        zoo.testing.assert_close(p.grad, wanted[name], tolerance=1e-5, what=name)
