"""What Contrast's paper states, the overlapping attention position by position, and every switch."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo_restoration import ocab as module
from zoo_restoration.contrast import Contrast, ResidualGroup
from zoo_restoration.ocab import OverlappingCrossAttention

SMALL = {"dim": 12, "groups": 2, "blocks": 1, "heads": 2, "window": 4, "state": 4, "head_width": 8}


def make(scale=2, **arguments):
    torch.manual_seed(0)
    return Contrast(scale, **{**SMALL, **arguments}).eval()


def attention(window=4, overlap=0.5, heads=2):
    torch.manual_seed(1)
    layer = OverlappingCrossAttention(8, window, overlap, heads).double()
    torch.nn.init.normal_(layer.bias)
    return layer


def by_hand(layer, x):
    """Query by query, from the definition: softmax over the key window, zeros beyond the edges among the keys."""
    M, far, h = layer.window, layer.margin, layer.heads
    batch, height, width, dim = x.shape
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    out = torch.zeros_like(x)
    side = M + layer.key_window - 1
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                top, left = i // M * M - far, j // M * M - far
                for head in range(h):
                    part = slice(head * dim // h, (head + 1) * dim // h)
                    scores, values = [], []
                    for a in range(layer.key_window):
                        for c in range(layer.key_window):
                            y, z = top + a, left + c
                            inside = 0 <= y < height and 0 <= z < width
                            key = k[b, y, z, part] if inside else torch.zeros_like(q[b, i, j, part])
                            value = v[b, y, z, part] if inside else torch.zeros_like(q[b, i, j, part])
                            row = (a - i % M + M - 1) * side + c - j % M + M - 1
                            scores.append(q[b, i, j, part] @ key * (dim // h) ** -0.5 + layer.bias[row, head])
                            values.append(value)
                    out[b, i, j, part] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return layer.proj(out)


@pytest.mark.parametrize(("window", "overlap"), [(4, 0.5), (2, 0.0), (2, 1.0)])
def test_attention_is_its_definition(window, overlap):
    layer = attention(window, overlap)
    x = torch.randn(2, 2 * window, 3 * window, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_a_query_window_sees_exactly_its_key_window():
    layer = attention()  # windows of 4, keys one position beyond each side
    x = torch.randn(1, 12, 16, 8, dtype=torch.float64, requires_grad=True)
    for row, column in ((0, 0), (1, 2), (2, 3)):
        query = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        (gradient,) = torch.autograd.grad(layer(x)[0][query].sum(), x)
        seen = gradient[0].abs().amax(-1) > 0
        wanted = torch.zeros(12, 16, dtype=torch.bool)
        wanted[max(4 * row - 1, 0) : 4 * row + 5, max(4 * column - 1, 0) : 4 * column + 5] = True
        assert torch.equal(seen, wanted)


def test_lines_of_windows_one_at_a_time(monkeypatch):
    layer = attention().float()
    x = torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(module, "AT_ONCE", 1)
        torch.testing.assert_close(layer(x), whole)


def test_windows_that_do_not_fit():
    with pytest.raises(ValueError, match="no whole windows of 4"):
        attention()(torch.randn(1, 6, 8, 8).double())
    with pytest.raises(ValueError, match="whole number of positions"):
        OverlappingCrossAttention(8, 5, 0.5, 2)
    with pytest.raises(ValueError, match="heads must divide"):
        OverlappingCrossAttention(8, 4, 0.5, 3)


def test_the_group_is_the_papers_formula():
    group = make().groups[0]
    x = torch.randn(1, 8, 8, 12)
    y = x
    for block in group.blocks:
        y = block(y)
    torch.testing.assert_close(group(x), group.conv(group.ocab(y)) + x)
    assert isinstance(group, ResidualGroup)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head", ["pixelshuffle", "direct"])
def test_scales(scale, head):
    y = make(scale, head=head)(torch.rand(1, 3, 7, 5))
    assert y.shape == (1, 3, 7 * scale, 5 * scale)


def test_every_pixel_reaches_the_centre():
    model = make(groups=1).double()
    x = torch.rand(1, 3, 16, 20, dtype=torch.float64, requires_grad=True)
    model(x)[0, :, 16, 20].sum().backward()
    assert bool((x.grad[0].abs().amax(0) > 0).all())


def test_without_scans_the_field_is_local():
    """The attention alone looks one key window far: what the scans are there for."""
    model = make(groups=1, blocks=0).double()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model(x)[0, :, 0, 0].sum().backward()
    assert float(x.grad[..., 16:, 16:].abs().max()) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"block": "mambair"},
        {"vss_mlp_ratio": 2.0},
        {"attention": False},
        {"overlap": 1.0},
        {"long_residual": False},
        {"gate": False, "expand": 1.0, "dt_rank": 2, "conv": 1},
        {"mean": [0.0, 0.0, 0.0]},
        {"qkv_bias": False, "mlp_ratio": 1.0},
        {"in_chans": 1},
        {"base": "nearest"},
        {"base": "bilinear"},
        {"base": "bicubic"},
        {"blocks": 3, "drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_every_switch(arguments):
    model = make(**arguments)
    x = torch.rand(2, model.in_chans, 8, 12)
    y = model(x)
    assert y.shape == (2, model.in_chans, 16, 24)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_mean_is_taken_off_and_put_back():
    model = make(mean=[0.5, 0.25, 0.125])
    x = torch.full((1, 3, 8, 8), 0.5)
    plain = make(mean=[0.0, 0.0, 0.0])
    plain.load_state_dict(model.state_dict())
    mean = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    torch.testing.assert_close(model(x), plain(x - mean) + mean)


def test_the_base_is_what_is_added_to():
    model = make(3, base="nearest")
    x = torch.rand(1, 3, 5, 6)
    with torch.no_grad():
        for p in model.head.parameters():
            p.zero_()
        assert torch.equal(model(x), x.repeat_interleave(3, 2).repeat_interleave(3, 3))


def test_mambair_block():
    model = make(block="mambair")
    block = model.groups[0].blocks[0]
    x = torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        block.scale.fill_(0.5)
        block.scale2.fill_(2.0)
        y = 0.5 * x + block.op(block.norm(x))
        n = block.norm2(y)
        convs = block.convs
        z = convs.conv2(F.gelu(convs.conv1(n)))
        gate = torch.sigmoid(convs.fc2(F.relu(convs.fc1(z.mean((1, 2))))))
        torch.testing.assert_close(block(x), 2.0 * y + z * gate[:, None, None])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"block": "swin"}, "'vmamba' or 'mambair'"),
        ({"head": "nearest"}, "'pixelshuffle' or 'direct'"),
        ({"scale": 5}, "3 or a power of 2"),
        ({"base": "linear"}, "'bilinear', 'bicubic'"),
        ({"groups": 0}, "1 or more groups"),
        ({"mean": [0.5]}, "one number for each"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        make(**arguments)


def test_another_scale_keeps_the_deep_weights(tmp_path):
    model = zoo.create("contrast_micro")
    zoo.save(model, tmp_path / "m")
    other = zoo.load(tmp_path / "m", scale=4)
    assert other(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)
    torch.testing.assert_close(other.groups.state_dict(), model.groups.state_dict())
    assert any("head" in change for change in other.zoo_info.changes)
