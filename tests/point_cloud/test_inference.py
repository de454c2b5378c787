"""In inference on a CPU groups, patches and clouds go through a few at a time: the numbers are the definition's."""

import pytest
import torch
from torch import nn

import zoo_kernels
from zoo.layers import inference
from zoo.layers import linear as linear_module
from zoo_kernels import runtime
from zoo_point_cloud import grouping, layers, pointmamba
from zoo_point_cloud.geometry import gather
from zoo_point_cloud.grouping import Grouper, PreBlock, group_and_pool
from zoo_point_cloud.layers import ConvNormAct, MambaLayer, PointNorm, ResidualStack, by_clouds
from zoo_point_cloud.pcm import PCM, PCMSegmentation
from zoo_point_cloud.pointmamba import PointMamba

SMALL = {
    "embed_dim": 12, "dim_expansion": [1, 2], "pre_blocks": [1, 2], "mamba_blocks": [1, 2], "pos_blocks": [1, 0],
    "k_neighbors": [6, 6], "k_strides": [1, 2], "reducers": [1, 2], "orders": ["xyz", "z", "hilbert-trans"],
    "prompts": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Pieces so small that every loop turns several times, and products by the library that serves large ones."""
    for module, name, value in (
        (grouping, "BLOCK", 1),
        (grouping, "ROWS", 40),
        (layers, "MIXED", 1),
        (pointmamba, "PATCH_ROWS", 30),
        (inference, "BLOCK", 16),
        (linear_module, "PRODUCTS", 1),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


def lively(model: nn.Module) -> nn.Module:
    """Batch norms whose statistics and parameters are not those they start with."""
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                t.data.copy_(torch.rand(t.shape, generator=g) + low)
    for name, p in model.named_parameters():
        if "affine" in name:
            p.data.add_(torch.rand(p.shape, generator=g) - 0.5)
    return model.eval()


def compare(model: nn.Module, *inputs: torch.Tensor, tolerance: float = 2e-5) -> torch.Tensor:
    with zoo_kernels.backend("reference"):
        expected = model(*inputs)
    with torch.inference_mode():
        found = model(*inputs)
    assert expected.requires_grad
    assert not found.requires_grad
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"normalize": "center"},
        {"normalize": None, "use_xyz": False},
        {"groups": 3, "bias": True},
        {"res_expansion": 0.5, "activation": "gelu"},
        {"use_xyz": False, "block_residual": False, "activation": "leakyrelu"},
        {"two_way": False, "rms_norm": False, "bias": True},
    ],
)
def test_pcm(flags):
    torch.manual_seed(0)
    compare(lively(PCM(5, **{**SMALL, **flags})), torch.rand(3, 50, 3))


def test_pcm_segmentation():
    torch.manual_seed(0)
    decoder = {"decoder_channels": [16, 12], "decoder_blocks": [1, 2], "context_dim": 8}
    model = lively(PCMSegmentation(6, **SMALL, **decoder))
    compare(model, torch.rand(2, 50, 3))


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_pointmamba(pool):
    torch.manual_seed(0)
    model = lively(PointMamba(5, embed_dim=24, depth=2, num_groups=16, group_size=8, pool=[pool]))
    compare(model, torch.rand(3, 60, 3))


def stage(width: int = 12, **grouper):
    torch.manual_seed(0)
    group = Grouper(width, 2, 5, **grouper)
    pre = PreBlock(group.out_channels, 16, 1, groups=1, expansion=1.0, bias=False, act="relu")
    return lively(nn.ModuleList([group, pre]))


@pytest.mark.parametrize("sets", [grouping.FUSED, ()])
def test_groups_in_one_operator_and_by_torch_s_products(monkeypatch, sets):
    """On processors for which the operator is not the faster way torch's products serve, as they do other networks."""
    calls = []
    monkeypatch.setattr(grouping, "FUSED", sets)
    monkeypatch.setattr(grouping, "grouped_mlp", lambda *x, **k: calls.append(1) or zoo_kernels.grouped_mlp(*x, **k))
    torch.manual_seed(0)
    for flags, fuses in (({}, True), ({"activation": "gelu"}, False), ({"groups": 3}, False), ({"bias": True}, True)):
        calls.clear()
        compare(lively(PCM(5, **{**SMALL, **flags})), torch.rand(3, 50, 3))
        served = runtime.instruction_set() in sets and fuses
        assert len(calls) == (2 if served else 0)  # stages


def test_a_hook_on_a_layer_of_a_group_sees_its_rows():
    group, pre = stage()
    seen = []
    pre.operation[0].net1[0].register_forward_hook(lambda _m, _i, y: seen.append(y.numel() // y.shape[-1]))
    with torch.inference_mode():
        group_and_pool(group, pre, torch.rand(2, 60, 3), torch.rand(2, 60, 12), None)
    assert sum(seen) == 2 * 30 * 5


@pytest.mark.parametrize("normalize", ["anchor", "center"])
def test_what_all_points_have_in_common_costs_no_digits_and_no_rows(monkeypatch, normalize):
    group, _ = stage(normalize=normalize)
    p, x = torch.rand(2, 60, 3), torch.rand(2, 60, 12) + 20
    groups = group.find(p, x, None)[1]
    rows = gather(groups.x, groups.index).double()
    middle = groups.centres.double().unsqueeze(2) if normalize == "anchor" else rows.mean(dim=2, keepdim=True)
    expected = (rows - middle).flatten(1).std(dim=1)
    monkeypatch.setattr(Grouper, "_differences", lambda *_: pytest.fail("the differences are made one by one"))
    with torch.inference_mode():
        torch.testing.assert_close(group.spread(groups).double(), expected, rtol=1e-5, atol=0)


def test_differences_far_smaller_than_their_terms_keep_their_digits():
    """A fine cloud far from the origin: there the first layer is not applied before the subtraction."""
    group, pre = stage()
    p = torch.rand(2, 60, 3) * 1e-3
    x = torch.rand(2, 60, 12) * 1e-3 + 100
    exact = stage().double()
    for a, b in zip(exact.parameters(), nn.ModuleList([group, pre]).parameters(), strict=True):
        a.data.copy_(b)
    with torch.inference_mode():
        found = group_and_pool(group, pre, p, x, None)[1]
        expected = group_and_pool(*exact, p.double(), x.double(), None)[1]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_all_points_in_one_place():
    group, pre = stage()
    p, x = torch.full((1, 60, 3), 0.3), torch.full((1, 60, 12), 5.0)
    with torch.inference_mode():
        found = group_and_pool(group, pre, p, x, None)[1]
    with zoo_kernels.backend("reference"):
        expected = group_and_pool(group, pre, p, x, None)[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_folded_follows_the_parameters():
    layer = lively(ConvNormAct(8, 16))
    x = torch.rand(200, 8)
    for change in (lambda: layer.net[0].weight.mul_(2), lambda: layer.net[1].running_mean.add_(1)):
        with torch.inference_mode():
            before = layer(x)
        with torch.no_grad():
            change()
        with torch.inference_mode():
            after = layer(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, layer.net(x), atol=1e-5, rtol=1e-5)


def test_statistics_of_a_batch_are_those_of_the_whole_batch():
    """A model in training mode is not cut into pieces, gradients or not."""
    layer, x = ConvNormAct(4, 8).train(), torch.rand(100, 4)
    with torch.no_grad():
        found = layer(x)
    assert layer.net[1].num_batches_tracked == 1
    torch.testing.assert_close(found, layer.net(x))
    stack = ResidualStack(4, 2, groups=1, expansion=1.0, bias=False, act="relu").eval()
    for m in stack.modules():
        if isinstance(m, PointNorm):
            m.running_mean = m.running_var = None  # statistics of the batch in evaluation too
    with torch.inference_mode():
        torch.testing.assert_close(stack(x), stack.operation(x))


def test_hooks_inside_are_called():
    group, pre = stage()
    seen = []
    pre.transfer.net[0].register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    layer = lively(ConvNormAct(8, 16))
    layer.net[2].register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    with torch.inference_mode():
        group_and_pool(group, pre, torch.rand(1, 60, 3), torch.rand(1, 60, 12), None)
        layer(torch.rand(100, 8))
    assert seen == [(1, 30, 5, 16), (100, 16)]


def test_half_precision():
    torch.manual_seed(0)
    model, points = lively(PCM(5, **SMALL)), torch.rand(2, 50, 3)
    with torch.inference_mode():
        expected, found = model(points), model.bfloat16()(points)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_patches_in_half_precision_are_as_exact_as_their_definition():
    """Weights multiplied beforehand are rounded once; what is said of a patch's maximum keeps its place."""
    torch.manual_seed(0)
    encoder, patches = lively(pointmamba.PatchEncoder(24)).double(), torch.randn(2, 6, 8, 3, dtype=torch.float64)
    with torch.inference_mode():
        expected = encoder(patches)
        encoder, patches = encoder.bfloat16(), patches.bfloat16()
        with zoo_kernels.backend("reference"):
            plain = (encoder(patches).double() - expected).norm()
        found = (encoder(patches).double() - expected).norm()
    assert 0 < found < 1.5 * plain < 0.1 * expected.norm()


@pytest.mark.parametrize("place", [(0, 3), (1, 0), (1, 3)])
def test_a_layer_of_a_patch_encoder_that_was_replaced_is_called(place):
    class Half(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return 0.5 * self.conv(x)

    torch.manual_seed(0)
    encoder, patches = lively(pointmamba.PatchEncoder(24)), torch.randn(2, 6, 8, 3)
    layers = (encoder.first_conv, encoder.second_conv)[place[0]]
    layers[place[1]] = Half(layers[place[1]])
    compare(encoder, patches)


def test_clouds_by_themselves():
    layer, x = MambaLayer(8).eval(), torch.rand(3, 20, 8)
    calls = []
    with torch.no_grad():
        found = by_clouds(lambda part: calls.append(len(part)) or layer(part)[0], x)
    assert calls == [1, 1, 1]
    torch.testing.assert_close(found, layer(x)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["anchor", "center"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_the_scale_of_groups_is_that_of_their_differences(normalize: str, offset: float) -> None:
    """From sums of their terms, or, where these would cancel, of the differences themselves."""
    torch.manual_seed(0)
    group = Grouper(24, 2, 6, normalize=normalize)
    p, x = torch.rand(3, 128, 3), torch.randn(3, 128, 24) * 0.7 + offset
    _, groups, _ = group.find(p, x, None)
    differences = gather(groups.x, groups.index).double()
    middle = differences.mean(dim=2, keepdim=True) if normalize == "center" else groups.centres.double().unsqueeze(2)
    exact = (differences - middle).flatten(1).std(dim=1)
    torch.testing.assert_close(group.spread(groups).double(), exact, rtol=2e-5, atol=0)
