"""Flags of the three systems that no recorded file sets, keys both ways, and what the models promise."""

import pytest
import torch

import zoo
from zoo_point_cloud.occmamba import occupancy
from zoo_point_cloud.pcm import tiles
from zoo_point_cloud.pointmamba import chamfer
from zoo_registry import resolve

ENCODER = {
    "in_channels": 3, "embed_dim": 12, "groups": 1, "res_expansion": 1.0, "use_xyz": True, "dim_expansion": [1, 2],
    "pre_blocks": [1, 1], "pos_blocks": [0, 0], "k_neighbors": [4, 4], "reducers": [1, 2], "mamba_blocks": [1, 2],
    "mamba_layers_orders": ["xyz", "z", "hilbert-trans"], "bimamba_type": "v2", "mamba_pos": True,
    "use_order_prompt": True, "prompt_num_per_order": 2,
}  # fmt: skip
HEAD = {"NAME": "ClsHead", "num_classes": 5, "mlps": [8], "norm_args": {"norm": "bn1d"}}


def random_state(system, config):
    """A state dict in the original's format with random values, from our own model's inverse key table."""
    adapter = zoo.reference(system)
    models = []
    load, adapter.load = adapter.load, lambda model, state, **_: models.append(model) or model
    torch.manual_seed(0)
    adapter.build(config, {"x.mixer.x_proj_b.weight": torch.empty(0)})
    adapter.load = load
    ours = models[0].state_dict()
    theirs = adapter.to_reference(ours, model=models[0])
    again = adapter.to_zoo(theirs, model=models[0])
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[k], ours[k]) for k in ours)
    return adapter, theirs


@pytest.mark.parametrize(
    ("flags", "has", "has_not"),
    [
        ({}, "encoder.pos_proj.1.weight", "encoder.pos_proj.weight"),
        ({"groups": 2}, "encoder.pre_blocks_list.0.operation.0.net2.3.weight", None),
        ({"pos_blocks": [2, 0]}, "encoder.pos_blocks_list.0.operation.1.net1.0.weight", None),
        ({"pos_type": "layer"}, "encoder.pos_proj.2.weight", "encoder.pos_proj.3.weight"),
        ({"dim_expansion": [1, 1]}, "encoder.pos_proj.weight", "encoder.residual_proj_blocks_list.1.weight"),
        ({"pos_proj_type": "mlp"}, "encoder.pos_proj.1.layers.2.weight", None),
        ({"normalize": "center", "k_strides": [2, 1]}, "encoder.local_grouper_list.0.affine_alpha", None),
        ({"normalize": None}, None, "encoder.local_grouper_list.0.affine_alpha"),
        ({"use_xyz": False, "res_expansion": 0.5}, None, None),
        ({"rms_norm": False}, "encoder.mamba_blocks_list.1.1.norm.bias", None),
        ({"bimamba_type": "none"}, None, "encoder.mamba_blocks_list.1.1.mixer.A_b_log"),
        ({"block_residual": False}, None, "encoder.residual_proj_blocks_list.1.weight"),
        ({"use_order_prompt": False, "mamba_pos": False}, None, "encoder.order_prompt.weight"),
        ({"cls_pooling": "mean"}, None, None),
        ({"cls_pooling": "both", "bias": True, "activation": "gelu"}, "encoder.embedding.net.0.bias", None),
        ({"mamba_layers_orders": "hilbert"}, None, None),
    ],
)
def test_pcm_flags(flags, has, has_not):
    config = {"encoder_args": {**ENCODER, **flags}, "cls_args": HEAD}
    adapter, theirs = random_state("pcm", config)
    assert has is None or has in theirs
    assert has_not is None or has_not not in theirs
    model = adapter.build(config, theirs)
    logits = adapter.run(model, {"pos": torch.rand(2, 40, 3)})["logits"]
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


def test_pcm_position_mlp_has_biases():
    """The original's MLP takes ``bias=False`` and does not hand it on."""
    _, theirs = random_state("pcm", {"encoder_args": {**ENCODER, "pos_proj_type": "mlp"}, "cls_args": HEAD})
    assert "encoder.pos_proj.1.layers.2.bias" in theirs


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ({"mlps": [8]}, ["0.0.bias", "0.0.weight", "2.0.bias", "2.0.weight"]),  # norm_args None: a bias, no norm
        (
            {"mlps": [8], "norm_args": {"norm": None}, "dropout": 0},
            ["0.0.bias", "0.0.weight", "1.0.bias", "1.0.weight"],
        ),
        ({"mlps": None}, ["0.0.bias", "0.0.weight"]),
        ({}, ["0.0.bias", "0.0.weight", "2.0.bias", "2.0.weight"]),
    ],
)
def test_pcm_heads_have_the_originals_defaults(head, keys):
    config = {"encoder_args": ENCODER, "cls_args": {"NAME": "ClsHead", "num_classes": 5, **head}}
    adapter, theirs = random_state("pcm", config)
    assert sorted(k.removeprefix("prediction.head.") for k in theirs if k.startswith("prediction.")) == keys
    if not head:
        assert theirs["prediction.head.0.0.weight"].shape == (256, 24)
    model = adapter.build(config, {f"module.{k}": v for k, v in theirs.items()})
    for act in ("gelu", {"act": "leaky_relu", "inplace": True}, None):
        other = adapter.build({**config, "cls_args": {**config["cls_args"], "act_args": act}}, theirs)
        points = torch.rand(2, 40, 3)
        assert torch.allclose(other(points), model(points)) is (head == {"mlps": None})
    bad = {**config["cls_args"], "act_args": {"act": "leaky_relu", "negative_slope": 0.3}}
    with pytest.raises(ValueError, match=r"cls_args\.act_args is"):
        adapter.build({**config, "cls_args": bad}, theirs)


def test_pcm_without_a_head_gives_features():
    adapter, theirs = random_state("pcm", {"encoder_args": ENCODER})
    assert not any(k.startswith("prediction.") for k in theirs)
    points = torch.rand(2, 40, 3)
    model = adapter.build({"encoder_args": ENCODER}, theirs)
    assert torch.equal(adapter.run(model, {"pos": points})["logits"], model.forward_features(points))


def test_pcm_decoder_arguments_override_the_encoders():
    decoder = {"encoder_channel_list": [12, 12, 24], "decoder_channel_list": [16, 12], "decoder_blocks": [0, 1],
               "mamba_blocks": [0, 1], "mamba_layers_orders": ["null"], "act_args": "gelu", "gmp_dim": 8}  # fmt: skip
    config = {"encoder_args": {**ENCODER, "bias": False, "rms_norm": True}, "decoder_args": decoder,
              "cls_args": {"NAME": "SegHead", "num_classes": 3, "norm_args": {"norm": "bn"}}}  # fmt: skip
    _, theirs = random_state("pcm", config)
    assert "decoder.gmp_map_end.net.0.bias" not in theirs
    config["decoder_args"] = {**decoder, "bias": True, "rms_norm": False}
    adapter, theirs = random_state("pcm", config)
    assert "decoder.gmp_map_end.net.0.bias" in theirs
    assert "decoder.mamba_list.1.0.norm.bias" in theirs
    model = adapter.build(config, theirs)
    assert isinstance(model.decoder.decode_list[1].extraction.operation[0].act, torch.nn.GELU)
    assert isinstance(model.decoder.decode_list[1].fuse.net[2], torch.nn.ReLU)  # as in the original, whatever act_args


@pytest.mark.parametrize("parts", [False, True])
def test_pcm_decoder_with_mamba(parts):
    decoder = {
        "NAME": "PointMambaPartDecoder" if parts else "PointMambaDecoder", "encoder_channel_list": [12, 12, 24],
        "decoder_channel_list": [16, 12], "decoder_blocks": [0, 1], "mamba_blocks": [2, 1],
        "mamba_layers_orders": ["xyz", "z", "null"], "gmp_dim": 8, "cls_dim": 8,
    }  # fmt: skip
    config = {
        "encoder_args": ENCODER, "decoder_args": decoder, "test_crop": 24,
        "cls_args": {"num_classes": 6, "mlps": None, "global_feat": "max", "norm_args": {"norm": "bn"}},
    }  # fmt: skip
    adapter, theirs = random_state("pcm", config)
    assert "decoder.mamba_list.0.1.mixer.A_b_log" in theirs
    model = adapter.build(config, theirs)
    inputs = {"pos": torch.rand(1, 40, 3), "x": torch.rand(1, 3, 40), "cls": torch.tensor([[3]])}
    assert adapter.run(model, inputs)["logits"].shape == (1, 6, 40)
    if parts:
        with pytest.raises(ValueError, match="from 0 to 15"):
            model(inputs["pos"], inputs["x"], torch.tensor([16]))
    last = {**decoder, "mamba_layers_orders": ["xyz", "z", "z"]}
    with pytest.raises(ValueError, match="'null'"):
        adapter.build({**config, "decoder_args": last}, theirs)


def test_pcm_refuses_what_no_sheet_describes():
    adapter = zoo.reference("pcm")
    with pytest.raises(ValueError, match="wings"):
        adapter.build({"encoder_args": {**ENCODER, "wings": 2}, "cls_args": HEAD}, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="bimamba_type is 'v1'"):
        adapter.build({"encoder_args": {**ENCODER, "bimamba_type": "v1"}, "cls_args": HEAD}, {"x": torch.zeros(1)})


@pytest.mark.parametrize("name", ["pcm_modelnet40", "pointmamba_modelnet"])
def test_per_cloud_order_makes_clouds_independent(name):
    tiny = {"embed_dim": 16, "depth": 2} if name.startswith("point") else {"embed_dim": 16}
    model = zoo.create(name, per_cloud_order=True, **tiny).eval()
    clouds = torch.rand(2, 256, 3)
    clouds[1] *= 7  # another extent, so other bits of the curve
    with torch.no_grad():
        together, alone = model(clouds), model(clouds[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert not model.mixes_batch


def test_tiles_cover_a_scene_once():
    points = torch.rand(500, 3) * torch.tensor([2.0, 5.0, 1.0])
    found = tiles(points, 60)
    assert len(found) == 9
    assert torch.equal(torch.cat(found).sort().values, torch.arange(500))
    assert len(tiles(points, 240)) == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"max_head": True},
        {"max_head": True, "avg_head": True},
        {"use_cls_token": True, "avg_head": True},
        {"rms_norm": True, "avg_head": True, "drop_out": 0.1},
    ],
)
def test_pointmamba_flags(flags):
    config = {"trans_dim": 12, "encoder_dims": 12, "depth": 2, "cls_dim": 5, "group_size": 4, "num_group": 8, **flags}
    adapter, theirs = random_state("pointmamba", config)
    assert ("cls_token" in theirs) == bool(flags.get("use_cls_token"))
    model = adapter.build(config, theirs)
    assert adapter.run(model, {"pts": torch.rand(2, 40, 3)})["logits"].shape == (2, 5)
    with pytest.raises(ValueError, match="needs at least 8"):
        model(torch.rand(1, 7, 3))
    with pytest.raises(ValueError, match="use_cls_token, max_head and avg_head"):
        adapter.build({k: v for k, v in config.items() if k not in flags}, theirs)


@pytest.mark.parametrize("kind", ["rand", "block"])
@pytest.mark.parametrize("loss", ["cdl1", "cdl2"])
def test_pointmamba_pretraining(kind, loss):
    inner = {
        "mask_ratio": 0.5, "mask_type": kind, "trans_dim": 12, "encoder_dims": 12, "depth": 1, "decoder_depth": 1,
    }  # fmt: skip
    config = {"group_size": 4, "num_group": 8, "loss": loss, "mamba_config": inner}
    adapter, theirs = random_state("pointmamba", config)
    assert "MAE_decoder.blocks.layers.0.mixer.A_log" in theirs
    model = adapter.build(config, theirs)
    centres = torch.rand(3, 8, 3)
    mask = model.draw_mask(centres)
    assert mask.sum(1).tolist() == [4, 4, 4]
    if kind == "block":  # the hidden centres are the nearest to one of them
        for c, m in zip(centres, mask, strict=True):
            distance = torch.cdist(c, c)
            sets = [set(row.topk(4, largest=False).indices.tolist()) for row in distance]
            assert set(m.nonzero().flatten().tolist()) in sets
    found = model(torch.rand(2, 30, 3))
    assert found["rebuilt"].shape == (8, 4, 3)
    assert found["loss"] > 0
    found["loss"].backward()


def test_chamfer_by_definition():
    a, b = torch.rand(5, 4, 3), torch.rand(5, 4, 3)
    d = torch.cdist(a.double(), b.double())
    there, back = d.amin(2), d.amin(1)
    assert chamfer(a, b, "cdl2").item() == pytest.approx(((there**2).mean() + (back**2).mean()).item(), rel=1e-5)
    assert chamfer(a, b, "cdl1").item() == pytest.approx(((there.mean() + back.mean()) / 2).item(), rel=1e-5)


OCC = {
    "in_channels": 4, "out_channels": 5, "trans_dim": 16, "down_blocks": [1, 1], "up_blocks": [1, 1],
    "fine_input_dim": 8, "norm_cfg": {"type": "GN", "num_groups": 4}, "cascade_ratio": 1,
}  # fmt: skip
XY, YX = {"order": "H2HE", "coor_order": "xy"}, {"order": "H2HE", "coor_order": "yx", "inverse": True}


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({}, None),
        ({"order_method": [XY, YX]}, None),
        ({"norm_cfg": {"type": "SyncBN"}}, "encoder.1.running_mean"),
        ({"upsample_ratio": 2}, "fine_out.3.weight"),
        ({"upsample_ratio": 2, "out_refine": 0.9}, "fine_out_refine.3.weight"),
        ({"upsample_ratio": 2, "out_refine": 0.5, "refine_method": "ratio"}, "fine_out_refine.0.weight"),
        ({"upsample_ratio": 2, "out_refine": 0.9, "refine_method": "another"}, "fine_out_refine.0.weight"),
        ({"cascade_ratio": 2, "final_occ_size": [16, 12, 4]}, "fine_mlp.1.weight"),
        ({"conv_cfg": {"type": "Conv3d"}}, "encoder.0.bias"),
    ],
)
def test_occmamba_flags(flags, key):
    config = {**OCC, **flags}
    adapter, theirs = random_state("occmamba", config)
    assert key is None or key in theirs
    whole = {f"module.pts_bbox_head.{k}": v for k, v in theirs.items()} | {"module.img_neck.weight": torch.ones(1)}
    model = adapter.build(config, whole)
    voxels = torch.randn(2, 4, 8, 6, 2)  # not square
    output = model(voxels)
    assert output["coarse"].shape == (2, 5, 8, 6, 2)
    alone = model(voxels[1:])
    torch.testing.assert_close(alone["coarse"][0], output["coarse"][1], atol=1e-4, rtol=1e-4)
    if "upsample_ratio" in flags:
        assert output["fine"].shape == (2, 5, 16, 12, 4)
    if "cascade_ratio" in flags:
        wanted = int((output["coarse"][0].argmax(0) != 0).sum()) * 8
        assert output["fine"][0]["logits"].shape == (wanted, 5)
        whole = occupancy(output, 0, 2)
        coords = output["fine"][0]["coords"]
        assert whole.shape == (16, 12, 4)
        assert torch.equal(whole[tuple(coords.t())], output["fine"][0]["logits"].argmax(1))
        model.topk = 3
        assert len(model(voxels)["fine"][0]["logits"]) == 24


def test_occmamba_out_refine_changes_only_unsure_voxels():
    config = {**OCC, "upsample_ratio": 2, "out_refine": 0.25}
    adapter, theirs = random_state("occmamba", config)
    model, voxels = adapter.build(config, theirs), torch.randn(1, 4, 8, 8, 2)
    refined = model(voxels)["fine"]
    model.out_refine = 0.0
    plain = model(voxels)["fine"]
    unsure = plain.softmax(1).amax(1) <= 0.25
    changed = (refined != plain).any(1)
    assert torch.equal(changed, unsure)
    assert 0 < int(unsure.sum()) < unsure.numel()


def test_occmamba_defaults_are_the_originals():
    needed = {k: OCC[k] for k in ("in_channels", "out_channels")}
    adapter, theirs = random_state("occmamba", {**needed, "down_blocks": [1], "up_blocks": [1]})
    assert theirs["encoder.3.weight"].shape[0] == 128  # trans_dim
    assert "fine_mlp.0.weight" in theirs
    norm = {"type": "GN", "num_groups": 4, "eps": 0.25}
    model = adapter.build({**OCC, "norm_cfg": norm}, random_state("occmamba", OCC)[1])
    assert model.encoder[1].eps == 0.25
    with pytest.raises(ValueError, match="norm_cfg holds affine"):
        adapter.build({**OCC, "norm_cfg": {"type": "BN", "affine": False}}, theirs)


def test_occmamba_refines_at_the_resolution_of_its_features():
    """With fewer stages up than down the result is coarser than the voxels, which are brought to its size."""
    config = {**OCC, "down_blocks": [1, 1, 1], "up_blocks": [1, 1], "upsample_ratio": 2, "out_refine": 0.9}
    adapter, theirs = random_state("occmamba", config)
    output = adapter.build(config, theirs)(torch.randn(1, 4, 8, 8, 2))
    assert output["coarse"].shape[2:] == (4, 4, 1)
    assert output["fine"].shape[2:] == (8, 8, 2)


V1 = {"NAME": "PointMamba", "trans_dim": 24, "depth": 3, "cls_dim": 5, "num_group": 8, "group_size": 4}


def test_pointmamba_v1_sorts_along_each_axis():
    """One sequence for each axis, each by its own coordinate; no order indicator; clouds do not mix."""
    adapter, theirs = random_state("pointmamba", V1)
    assert "norm.weight" in theirs
    assert not any(k.startswith("OrderScale") for k in theirs)
    model = adapter.build({k: v for k, v in V1.items() if k != "NAME"}, theirs)  # known by its keys too
    points = torch.randn(2, 40, 3)
    tokens, _, centres, orders = model.sequence(points)
    assert tokens.shape == (2, 24, 24)
    for axis, order in enumerate(orders):
        assert (centres.gather(1, order[..., None].expand(-1, -1, 3))[..., axis].diff(dim=1) >= 0).all()
    torch.testing.assert_close(model(points[1:])[0], model(points)[1], atol=1e-5, rtol=1e-4)
    expected = model.head(model.norm(model.blocks(tokens, model.sequence(points)[1])[0]).mean(dim=1))
    torch.testing.assert_close(model(points), expected)
    with pytest.raises(ValueError, match="not built for the first version"):
        adapter.build({**V1, "use_cls_token": True}, theirs)


def test_pointmamba_v1_parts():
    """A point gets its nearest centre's features: of the 3 nearest centres all are copies of one."""
    config = {**{k: v for k, v in V1.items() if k != "NAME"}, "fetch_idx": [0, 1, 2]}
    adapter, theirs = random_state("pointmamba", config)
    assert theirs["propagation_0.mlp_convs.1.weight"].shape == (1024, 96, 1)
    assert theirs["convs1.weight"].shape == (512, 1024 + 6 * 24 + 64, 1)
    model = adapter.build(config, theirs)
    points, kinds = torch.randn(2, 40, 3), torch.tensor([3, 15])
    seen = []
    model.propagate.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = adapter.run(
        model, {"pts": points.transpose(1, 2), "cls_label": torch.nn.functional.one_hot(kinds, 16)[:, None]}
    )["log_probs"]
    assert found.shape == (2, 40, 5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 40))
    torch.testing.assert_close(found, model(points, kinds).log_softmax(1).transpose(1, 2))
    centres = model.group(points)[1]
    nearest = torch.cdist(points.double(), centres.double()).argmin(-1)
    for b in range(2):
        for centre in range(8):
            rows = seen[0][b, nearest[b] == centre, 3:]
            torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    with pytest.raises(ValueError, match="three different layers"):
        adapter.build({**config, "fetch_idx": [0, 1, 3]}, theirs)


def test_pointmamba_parts_code_objects_as_point_mae_does():
    model = zoo.create("pointmamba_shapenetpart", **resolve("pointmamba_shapenetpart").card.tiny).eval()
    x = torch.randn(3, 16)
    before = model.shape_code.net[:2](x)
    torch.testing.assert_close(model.shape_code(x), torch.nn.functional.leaky_relu(before, 0.2))


def test_pointmamba_pretraining_has_no_dropout():
    """``drop_out`` stands in the original's configuration; neither of the two mixers gets it."""
    inner = {"trans_dim": 24, "depth": 2, "decoder_depth": 1}
    config = {"num_group": 8, "group_size": 4, "drop_out": 0.5, "mamba_config": inner}
    adapter, theirs = random_state("pointmamba", config)
    model = adapter.build(config, {f"module.{k}": v for k, v in theirs.items()})
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("name", ["pcm_tiny_shapenetpart", "pointmamba_shapenetpart"])
@pytest.mark.parametrize("kinds", [[1, -1], [1, 16], [1]])
def test_kinds_of_objects_that_are_not_known(name, kinds):
    model = zoo.create(name, **resolve(name).card.tiny).eval()
    points = torch.rand(2, 96, 3)
    features = (torch.rand(2, 7, 96),) if name.startswith("pcm") else ()
    with pytest.raises(ValueError, match="expected 2 numbers from 0 to 15"):
        model(points, *features, torch.tensor(kinds))


def test_masks_and_orders_that_cannot_be():
    model = zoo.create("pointmamba_pretrain", **resolve("pointmamba_pretrain").card.tiny)
    points, groups = torch.rand(2, 24, 3), 8
    uneven = torch.zeros(2, groups)
    uneven[0, :3] = uneven[1, :4] = 1
    for mask in (torch.zeros(2, groups), torch.ones(2, groups), uneven, torch.ones(2, 3)):
        with pytest.raises(ValueError, match="one number a row, from 1 to 7"):
            model(points, mask)
    with pytest.raises(ValueError, match="order is 'z'; expected 'hilbert' or 'hilbert-trans'"):
        model(points, order="z")
