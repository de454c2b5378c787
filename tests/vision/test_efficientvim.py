"""EfficientViM's dense backbone and neck: what the detection code's constructors take beyond the published settings."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.reference import read_golden

TESTS = Path(__file__).parents[1]


def test_the_detection_backbone_freezes_its_stem_and_the_neck_takes_norms():
    golden = read_golden(TESTS / "golden/efficientvim__dense_fpn.safetensors")
    adapter = zoo.reference("efficientvim")
    neck = {**golden.config["neck"], "norm_cfg": {"type": "SyncBN"}, "act_cfg": {"type": "ReLU"}}
    neck |= {"no_norm_on_lateral": True, "upsample_cfg": {"mode": "bilinear", "align_corners": True}}
    backbone = {**golden.config["backbone"], "frozen_stages": 0}
    state = {k: v for k, v in golden.state.items() if not re.search(r"fpn_convs\..*bias", k)}
    for key in [k for k in state if "fpn_convs." in k]:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[key.replace("conv.weight", f"bn.{leaf}")] = torch.rand(len(state[key])) + 0.5
    model = adapter.build({"backbone": backbone, "neck": neck}, state)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {k for k, _ in model.named_parameters() if k.startswith("backbone.patch_embed.")} != set()

    found = adapter.run(model, golden.inputs)  # the topmost lateral reaches the middle one by the given resizing
    lateral = [F.relu(F.conv2d(found[f"stage{i}"], state[f"neck.lateral_convs.{i}.conv.weight"],
                               state[f"neck.lateral_convs.{i}.conv.bias"])) for i in (1, 2)]  # fmt: skip
    middle = lateral[0] + F.interpolate(lateral[1], lateral[0].shape[2:], mode="bilinear", align_corners=True)
    bn = [state[f"neck.fpn_convs.1.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    expected = F.relu(F.batch_norm(F.conv2d(middle, state["neck.fpn_convs.1.conv.weight"], padding=1), *bn))
    torch.testing.assert_close(found["fpn3"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="norm_cfg is"):
        adapter.build({"backbone": backbone, "neck": {**neck, "norm_cfg": {"type": "GN", "num_groups": 2}}}, state)


@pytest.mark.parametrize("stem", ["efficientvim__distilled", "efficientvim__dense_fpn"])
def test_what_a_state_dict_lacks_is_named(stem):
    golden = read_golden(TESTS / f"golden/{stem}.safetensors")
    adapter = zoo.reference("efficientvim")
    with pytest.raises(zoo.errors.KeysDoNotMatch, match="missing"):
        adapter.build(golden.config, {})
    with pytest.raises(ValueError, match="embed_dims"):
        adapter.build({**golden.config, "embed_dims": [8, 8, 8]}, golden.state)
    parallel = adapter.build(golden.config, {f"module.{k}": v for k, v in golden.state.items()})
    name = next(iter(golden.outputs))
    torch.testing.assert_close(adapter.run(parallel, golden.inputs)[name], golden.outputs[name], rtol=1e-4, atol=1e-4)
