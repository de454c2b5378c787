"""DiMSUM's parts against literal forms of the original's steps: tokens moved in memory, transforms as convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo_generation.dimsum import blocks, parts
from zoo_generation.dimsum.model import DiMSUM, position_table
from zoo_kernels import paths

SMALL = {"img_resolution": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 4, "num_classes": 5,
         "zero_init": False}  # fmt: skip


def model(**more):
    torch.manual_seed(0)
    return DiMSUM(**{**SMALL, **more}).eval()


def inputs(batch=2, channels=4, side=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, side, side, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


# -- literal forms


def back_and_forth(x, g):
    """Every odd run of g tokens reversed."""
    x = x.unflatten(1, (g, g)).clone()
    x[:, 1::2] = x[:, 1::2].flip(2)
    return x.flatten(1, 2)


def transposed(x, g):
    return x.unflatten(1, (g, g)).transpose(1, 2).flatten(1, 2)


def windowed(x, g, w, columns):
    """The tokens window by window, and the function that puts them back."""
    cells = torch.arange(g * g).view(g // w, w, g // w, w)
    order = (cells.permute(2, 0, 3, 1) if columns else cells.permute(0, 2, 1, 3)).reshape(-1)
    return x[:, order], lambda y: y[:, order.argsort()]


def moved(h, i, g, continuity):
    """Tokens as layer i of four walks them, and back."""
    if i % 4 >= 2:
        h = transposed(h, g)
    if continuity:
        h = back_and_forth(h, g)
    if i % 2:
        h = h.flip(1)

    def undo(y):
        if i % 2:
            y = y.flip(1)
        if continuity:
            y = back_and_forth(y, g)
        return transposed(y, g) if i % 4 >= 2 else y

    return h, undo


def step(scan, u, c):
    """A gated mixer step along the tokens as they lie."""
    shift, scale, gate = scan.adaLN_modulation(c)
    return u + gate[:, None] * scan.mixer(u * (1 + scale[:, None]) + shift[:, None])


def dwt(x, filters):
    count = x.shape[1]
    return torch.cat([F.conv2d(x, f.expand(count, 1, 2, 2), stride=2, groups=count) for f in filters], 1)


def idwt(x, filters):
    b, _, h, w = x.shape
    x = x.view(b, 4, -1, h, w).transpose(1, 2)
    count = x.shape[1]
    return F.conv_transpose2d(x.reshape(b, -1, h, w), filters.repeat(count, 1, 1, 1), stride=2, groups=count)


ORDER = [i % 4 * 4 + i // 4 for i in range(16)]


def packets(x, module):
    b, n, c = x.shape
    g = int(n**0.5)
    filters = [getattr(module, f"w_{band}") for band in ("ll", "lh", "hl", "hh")]
    two = dwt(dwt(x.transpose(1, 2).reshape(b, c, g, g), filters), filters) / 4
    stacked = torch.cat([two.chunk(16, 1)[i] for i in ORDER], 1)  # (b, 16 c, g / 4, g / 4)
    return stacked.view(b, c, 4, 4, g // 4, g // 4).permute(0, 4, 2, 5, 3, 1).reshape(b, n, c)


def tokens(x, module):
    b, n, c = x.shape
    g = int(n**0.5)
    stacked = (x * 4).view(b, g // 4, 4, g // 4, 4, c).permute(0, 5, 2, 4, 1, 3).reshape(b, 16 * c, g // 4, g // 4)
    two = torch.cat([stacked.chunk(16, 1)[i] for i in ORDER], 1)
    return idwt(idwt(two, module.filters), module.filters).flatten(2).transpose(1, 2)


# -- transforms


@pytest.mark.parametrize("random", [False, True])
def test_wavelet_packets(random):
    torch.manual_seed(0)
    forward, inverse = parts.HaarPackets(), parts.HaarTokens()
    if random:  # stored filters count, whatever they are
        for buffer in (*forward.buffers(), *inverse.buffers()):
            buffer.normal_()
    x = torch.randn(2, 64, 6)
    torch.testing.assert_close(forward(x), packets(x, forward))
    torch.testing.assert_close(inverse(x), tokens(x, inverse), rtol=1e-5, atol=1e-5)
    if not random:
        torch.testing.assert_close(inverse(forward(x)), x)


def test_cosine_transform():
    forward, inverse = parts.BlockDCT(3), parts.BlockDCT(3, inverse=True)
    x = torch.randn(2, 64, 3)
    image = x.transpose(1, 2).reshape(2, 3, 8, 8)
    coefficients = F.conv2d(image, forward.weight, stride=4, groups=3)  # (2, 48, 2, 2)
    laid = coefficients.view(2, 3, 4, 4, 2, 2).permute(0, 4, 2, 5, 3, 1).reshape(2, 64, 3)
    torch.testing.assert_close(forward(x), laid, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse(forward(x)), x, rtol=1e-5, atol=1e-5)
    for module in (forward, inverse):
        nn.init.normal_(module.weight)  # stored filters count
    laid = F.conv2d(image, forward.weight, stride=4, groups=3)
    back = F.pixel_shuffle(F.conv2d(laid, inverse.weight, groups=3), 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(inverse(forward(x)), back, rtol=1e-4, atol=1e-4)


def test_einfft():
    torch.manual_seed(0)
    mixer = parts.EinFFT(8)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 9, 8)
    values = torch.fft.fftn(x.view(2, 9, 4, 2), dim=(1, 2), norm="ortho")
    for i, cut in ((1, F.relu), (2, lambda v: F.softshrink(v, 0.01))):
        weight, bias = (torch.view_as_complex(getattr(mixer, f"complex_{n}_{i}").movedim(0, -1).contiguous())
                        for n in ("weight", "bias"))  # fmt: skip
        values = torch.einsum("bnkc,kcd->bnkd", values, weight) + bias
        values = torch.complex(cut(values.real), cut(values.imag))
    wanted = torch.fft.ifftn(values, dim=(1, 2), norm="ortho").real.flatten(2)
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-4, atol=1e-5)


def test_fusion_asks_the_other_branch():
    torch.manual_seed(0)
    fusion = parts.CrossAttentionFusion(32)
    x1, x2 = torch.randn(2, 2, 9, 16)

    def heads(x):
        return x.view(2, 9, 3, 8, 2).permute(2, 0, 3, 1, 4)

    (q1, k1, v1), (q2, k2, v2) = heads(fusion.qkv1(x1)), heads(fusion.qkv2(x2))
    first = (q1 @ k2.transpose(-2, -1) / 2**0.5).softmax(-1) @ v2
    second = (q2 @ k1.transpose(-2, -1) / 2**0.5).softmax(-1) @ v1
    wanted = fusion.proj(torch.cat([a.transpose(1, 2).flatten(2) for a in (first, second)], -1))
    torch.testing.assert_close(fusion(x1, x2), wanted, rtol=1e-5, atol=1e-5)


def test_two_directions():
    """Each with its own parameters, the second from the end, on the same input and gate."""
    torch.manual_seed(0)
    mixer = parts.Mixer(8, both=True)
    one, two = parts.Mixer(8), parts.Mixer(8)
    state = mixer.state_dict()
    forward = {k: v for k, v in state.items() if "_b." not in k and "_b" not in k.split(".")[0]}
    one.load_state_dict(forward)
    names = {"A_log": "A_b_log", "D": "D_b"} | {
        f"{n}.{p}": f"{n}_b.{p}" for n in ("conv1d", "x_proj", "dt_proj") for p in ("weight", "bias")
    }
    two.load_state_dict({k: state[names[k]] if names.get(k) in state else v for k, v in forward.items()})
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(mixer(x), one(x) + two(x.flip(1)).flip(1), rtol=1e-4, atol=1e-5)


# -- scan orders are the moves of the original, whatever the layer


@pytest.mark.parametrize("continuity", [False, True])
@pytest.mark.parametrize("layer", range(4))
def test_layers_walk_rows_and_columns(layer, continuity):
    m = model(block_type="raw", depth=2, scanning_continuity=continuity)
    block, h = m.blocks[layer], torch.randn(2, 64, 16)
    c = torch.randn(2, 16)
    lying, undo = moved(block.norm(h), layer, 8, continuity)
    torch.testing.assert_close(block(h, c), undo(step(block, lying, c)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("continuity", [False, True])
@pytest.mark.parametrize("layer", range(2))
def test_windows_of_wavelets(layer, continuity):
    m = model(block_type="combined", scanning_continuity=continuity)
    scan = m.blocks[layer].freq_mamba
    u, c = torch.randn(2, 64, 8), torch.randn(2, 16)
    lying, undo = windowed(packets(u, scan.dwt), 8, 2, columns=layer == 1)
    if continuity:
        mixed = back_and_forth(step(scan, back_and_forth(lying, 8), c), 8)
    else:
        mixed = step(scan, lying, c)
    torch.testing.assert_close(scan(u, c), tokens(undo(mixed), scan.idwt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "wave", "window"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_blocks_with_a_feed_forward_step(kind, layer):
    m = model(block_type=kind, scanning_continuity=kind != "window")
    block = m.blocks[layer]
    h, c = torch.randn(2, 64, 16), torch.randn(2, 16)
    shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in block.adaLN_modulation(c))
    x = block.norm(h)
    if kind == "wave":
        x = packets(x, block.dwt)
    if kind == "window":
        x, undo = windowed(x, 8, 4, columns=layer % 2 == 1)
    else:
        x, undo = moved(x, layer, 8, True)
    x = x + gate * block.mixer(x * (1 + scale) + shift)
    x = x + gate2 * block.mlp(block.norm_2(x) * (1 + scale2) + shift2)
    x = undo(x)
    wanted = tokens(x, block.idwt) if kind == "wave" else x
    torch.testing.assert_close(block(h, c), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("continuity", [False, True])
def test_zigzags_of_cosines(continuity):
    m = model(block_type="combined_fourier", scanning_continuity=continuity)
    for layer in (0, 1):
        scan = m.blocks[layer].freq_mamba
        u, c = torch.randn(2, 64, 8), torch.randn(2, 16)
        shift, scale, gate = (v[:, None] for v in scan.adaLN_modulation(c))
        h = scan.dct_conv(u)
        h = back_and_forth(h, 8) if continuity else h
        tables = scan.mixer.zigzag_paths, scan.mixer.zigzag_paths_reverse
        assert tables[0][layer, :5].tolist() == ([0, 1, 8, 16, 9] if layer == 0 else [0, 8, 1, 2, 9])
        mixed = scan.mixer((h * (1 + scale) + shift)[:, tables[0][layer]])[:, tables[1][layer]]
        h = h + gate * mixed
        h = back_and_forth(h, 8) if continuity else h
        torch.testing.assert_close(scan(u, c), scan.idct_conv(h), rtol=1e-4, atol=1e-5)


def test_one_way_scans_do_not_turn():
    m = model(block_type="combined", scan_type="v2")
    assert not any(b.spatial_mamba.reverse or b.spatial_mamba.order for b in m.blocks)
    assert {b.freq_mamba.order for b in m.blocks} == {blocks.windows(2, columns=False)}
    assert all(b.freq_mamba.mixer.both and b.spatial_mamba.mixer.both for b in m.blocks)


def test_alternating_order():
    assert paths.get("alternating", (3, 3))[0].tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert torch.equal(paths.get("alternating(column)", (4, 4)), paths.get("transpose(snake)", (4, 4)))


# -- the network around the blocks


def run_literally(m, x, t, y):
    """The pass as the original writes it."""
    p, g, dim = m.patch_size, m.grid, m.hidden_size
    h = F.conv2d(x, m.x_embedder.proj.weight, m.x_embedder.proj.bias, stride=p).flatten(2).transpose(1, 2) + m.pos_embed
    i = torch.arange(128)
    angles = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * i / 128)
    c = m.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + m.y_embedder.embedding_table.weight[y]
    residual = torch.zeros_like(h)
    for i, block in enumerate(m.blocks):
        residual = residual + h
        h = block(residual, c)
        if m.attn_block is not None and (i + 1) % m.every == 0:
            a = m.attn_block[(i + 1) // m.every - 1] if isinstance(m.attn_block, nn.ModuleList) else m.attn_block
            h = attend(a, h, c)
    if m.norm_f is not None:
        h = m.norm_f(residual + h)
    shift, scale = m.final_layer.adaLN_modulation(c)
    h = m.final_layer.linear(F.layer_norm(h, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    return torch.einsum("nhwpqc->nchpwq", h.view(-1, g, g, p, p, m.out_channels)).reshape(
        -1, m.out_channels, g * p, g * p
    )


def attend(a, h, c):
    shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in a.adaLN_modulation(c))
    b, n, dim = h.shape
    x = F.layer_norm(h, (dim,), eps=1e-6) * (1 + scale) + shift
    q, k, v = a.attn.qkv(x).view(b, n, 3, 16, dim // 16).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-2, -1) * (dim // 16) ** -0.5).softmax(-1) @ v
    h = h + gate * a.attn.proj(mixed.transpose(1, 2).flatten(2))
    return h + gate2 * a.mlp(F.layer_norm(h, (dim,), eps=1e-6) * (1 + scale2) + shift2)


@pytest.mark.parametrize(
    "flags",
    [
        {"use_attn_every_k_layers": 2},
        {"use_attn_every_k_layers": 2, "use_independent_attn": True, "depth": 8, "use_gated_mlp": False},
        {"use_final_norm": True, "learn_sigma": True, "rms_norm": True},
        {"patch_size": 4, "in_channels": 3, "block_type": "combined_einfft", "num_classes": 7, "label_dropout": -1.0},
    ],
)
def test_the_whole_pass(flags):
    m = model(**{"block_type": "combined", "learnable_pe": True, **flags})
    x, t, y = inputs(channels=m.in_channels)
    with torch.no_grad():
        found = m(x, t, y)
        torch.testing.assert_close(found, run_literally(m, x, t, y), rtol=1e-4, atol=1e-5)
        assert found.shape[1] == m.in_channels * (2 if flags.get("learn_sigma") else 1)
        last = m.y_embedder.embedding_table.weight.shape[0] - 1
        torch.testing.assert_close(m(x, t), m(x, t, torch.full_like(y, last)))


def test_the_residual_ends_in_nothing():
    """Without a final norm the last block's output alone goes on; with one, its sum with the residual."""
    x, t, y = inputs()
    for final in (False, True):
        m = model(use_final_norm=final)
        seen: list[torch.Tensor] = []
        m.final_layer.register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
        between: dict[str, torch.Tensor] = {}
        m(x, t, y, between)
        same = torch.equal(seen[0], between["last_block_hidden"])
        assert same != final


def test_the_condition_does_nothing_in_the_mixer():
    m = model(block_type="combined", cond_mamba=True)
    x, t, y = inputs()
    before = m(x, t, y)
    for name, parameter in m.named_parameters():
        if "cond_proj" in name:
            nn.init.normal_(parameter)
    assert torch.equal(m(x, t, y), before)
    without = model(block_type="combined")
    without.load_state_dict({k: v for k, v in m.state_dict().items() if "cond_proj" not in k})
    assert torch.equal(without(x, t, y), before)
    assert set(m.unused_parameters) == {k.rpartition(".")[0] for k in m.state_dict() if "cond_proj" in k}


def test_training_drops_labels_and_paths():
    m = model(label_dropout=1.0, block_type="raw", depth=1).train()
    x, t, y = inputs()
    torch.testing.assert_close(m(x, t, y), m.eval()(x, t))  # every label is dropped
    m = model(drop_path=0.9)
    assert [round(d.rate, 3) for d in m.drop_paths] == [0, 0, 0.3, 0.6]
    m.train()
    torch.manual_seed(1)
    assert not torch.allclose(m(x, t, y), m.eval()(x, t, y))


def test_the_start_is_zero_velocity():
    m = model(zero_init=True, block_type="combined", use_attn_every_k_layers=2)
    x, t, y = inputs()
    assert not m(x, t, y).any()
    assert not any(b.adaLN_modulation[1].weight.any() for b in m.blocks)
    torch.testing.assert_close(m.pos_embed[0], position_table(16, 8))
    table = position_table(16, 8).view(8, 8, 16)
    angle = torch.tensor(3.0) * 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(table[5, 3, :8], torch.cat([angle.sin(), angle.cos()]))  # the column first


def test_bad_arguments():
    for flags, words in (
        ({"scan_type": "sweep_8"}, "scan_type is 'sweep_8', with which the original raises"),
        ({"scan_type": "v3"}, "scan_type is 'v3'; expected one of none, v2"),
        ({"pe_type": "cpe"}, "pe_type is 'cpe', with which the original raises"),
        ({"block_type": "mamba"}, "block_type is 'mamba'; expected one of linear, raw"),
        ({"img_resolution": 15}, "expected a multiple of patch_size, 2"),
        ({"img_resolution": 12, "block_type": "combined"}, "grid of side 6"),
        ({"hidden_size": 18}, "hidden_size is 18"),
        ({"hidden_size": 24, "block_type": "combined"}, "two branches of 8 heads"),
        ({"hidden_size": 24, "use_attn_every_k_layers": 2}, "a multiple of 16"),
        ({"use_independent_attn": True}, "use_independent_attn needs use_attn_every_k_layers"),
        ({"use_independent_attn": True, "use_attn_every_k_layers": 3, "depth": 5}, "the original raises an error"),
        ({"num_classes": 0}, "num_classes is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**flags)
    m = model()
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 16, 16\); expected \(batch, 4, 16, 16\)"):
        m(x[:, :3], t, y)
    with pytest.raises(ValueError, match=r"t has shape \(1,\); expected \(2,\)"):
        m(x, t[:1], y)


def test_published_sizes():
    assert len(zoo.create("dimsum_l2_imagenet256", device="meta").state_dict()) == 742
