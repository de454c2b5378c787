"""The original's format: gradients, arguments, and the kinds of checkpoints that its authors publish."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.reference import read_golden
from zoo_generation.dimsum.model import DiMSUM
from zoo_generation.dimsum.reference import arguments_of

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"img_resolution": 8, "hidden_size": 16, "depth": 2, "num_classes": 3, "use_attn_every_k_layers": 2}


@pytest.mark.parametrize("name", ["combined_dct", "linear_bimamba_v2", "linear_rope", "raw", "wave"])
def test_gradients(name):
    zoo.testing.check_golden(GOLDEN / f"dimsum__block_{name}.safetensors.xz", grad=True, grad_tolerance=1e-4)


def published():
    """What a training run of a tiny form of the published network would write."""
    torch.manual_seed(0)
    model = zoo.create("dimsum_l2_imagenet256", zero_init=False, **TINY)
    state = zoo.reference("dimsum").to_reference(model.state_dict(), model=model)
    return model.eval(), {k: v.clone() for k, v in state.items()}


def same(model, other):
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    with torch.no_grad():
        return torch.equal(model(x, t, y), other.eval()(x, t, y))


@pytest.mark.parametrize("kind", ["state", "training", "parallel", "safetensors", "without constants"])
def test_checkpoints(kind, tmp_path):
    model, state = published()
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "state":
        torch.save(state, path)
    elif kind == "training":
        other = {k: torch.zeros_like(v) for k, v in state.items()}
        optimizer = {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-4}],
        }
        torch.save({"model": other, "ema": state, "opt": optimizer, "args": Namespace(lr=1e-4), "epoch": 5}, path)
    elif kind == "parallel":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({k: v for k, v in state.items() if "dwt" not in k}, path)
    tag = "training" if kind == "training" else "in1k"
    found = zoo.load(f"dimsum_l2_imagenet256.{tag}", checkpoint=path, **TINY)
    assert same(model, found)
    if kind == "training":
        assert same(model, zoo.load("dimsum_l2_imagenet256", checkpoint=path, subkey="ema", **TINY))


def test_a_missing_key_is_named(tmp_path):
    _, state = published()
    del state["blocks.1.proj.qkv2.bias"]
    with pytest.raises(zoo.errors.KeysDoNotMatch, match=r"blocks\.1\.proj\.qkv2\.bias"):
        zoo.reference("dimsum").build(
            {**TINY, "block_type": "combined", "cond_mamba": True, "rms_norm": True, "label_dropout": 0.15}, state
        )


def test_constants_may_be_missing():
    """Files that leave out what the original computes at the start give the same model."""
    for name, constants in (("combined_dct", "zigzag"), ("wave", "dwt")):
        golden = read_golden(GOLDEN / f"dimsum__block_{name}.safetensors.xz")
        less = {k: v for k, v in golden.state.items() if constants not in k}
        assert len(less) < len(golden.state)
        adapter = zoo.reference("dimsum")
        whole, found = adapter.build(golden.config, golden.state), adapter.build(golden.config, less)
        assert all(torch.equal(v, whole.state_dict()[k]) for k, v in found.state_dict().items())


def test_arguments():
    config = {
        "hidden_size": 16,
        "fused_add_norm": True,
        "num_moe_experts": 8,
        "ssm_cfg": {"d_state": 4},
        "is_moe": False,
    }
    assert arguments_of(config) == {"hidden_size": 16, "ssm": {"d_state": 4}}
    model = DiMSUM(**arguments_of({**config, "depth": 1, "img_resolution": 8}))
    assert model.blocks[0].mixer.d_state == 4
    for config, words in (
        ({"is_moe": True}, "is_moe is set, with which the original raises"),
        ({"enable_fourier_layers": True}, "enable_fourier_layers is set"),
        ({"n_heads": 3}, "no configuration key 'n_heads'"),
        ({"ssm_cfg": {"n_heads": 3}}, r"no configuration key 'ssm_cfg\.n_heads'"),
    ):
        with pytest.raises(ValueError, match=words):
            arguments_of(config)
