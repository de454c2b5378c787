"""Change detectors beyond parity with their originals: arrangements, sizes, tiles, answers, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.reference import read_golden
from zoo_kernels import selective_scan
from zoo_registry import errors
from zoo_remote_sensing.encoder import DEFAULTS, forward_type, make_block
from zoo_remote_sensing.losses import lovasz_softmax
from zoo_remote_sensing.palettes import colours, label_set
from zoo_remote_sensing.tiling import blended, starts, tile_side

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_dim": 8, "mlp_ratio": 1.0}


@pytest.fixture(scope="module")
def semantic():
    torch.manual_seed(0)
    return zoo.create("changemamba_scd_tiny", **TINY).eval()


def test_odd_sizes_and_mismatched_dates(semantic):
    with torch.no_grad():
        out = semantic(torch.randn(1, 3, 33, 47), torch.randn(1, 3, 33, 47))
    assert [tuple(t.shape) for t in out] == [(1, 2, 33, 47), (1, 7, 33, 47), (1, 7, 33, 47)]
    with pytest.raises(ValueError, match="one grid"):
        semantic(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 40))


def test_misspelt_option_is_named():
    with pytest.raises(errors.BadArgument, match="mlp_ration"):
        zoo.create("changemamba_bcd_tiny", mlp_ration=2.0)


def test_forward_types():
    assert forward_type("v3noz") == {"gate": False, "gate_act": True, "out_norm": "norm"}
    assert forward_type("v2nonenozact") == {"gate": True, "gate_act": False, "out_norm": "none"}
    assert forward_type("v32dsoftmaxnoz") == {
        "paths": "raster+raster+reverse(raster)+reverse(raster)", "gate": False, "gate_act": True,
        "out_norm": "softmax",
    }  # fmt: skip
    # whatever begins with v0 is the first release's mixer, tags or not
    assert forward_type("v01") == forward_type("v0noz") == forward_type("v0seq")
    assert forward_type("v0")["conv_bias"]
    with pytest.raises(ValueError, match="forward_type"):
        forward_type("v9noz")


def test_one_and_two_ways_are_those_of_the_original():
    """v31d scans row by row four times, v32d twice and twice backwards, each with weights of its own."""
    torch.manual_seed(0)
    ways = {"v31dnoz": [False] * 4, "v32dnoz": [False, False, True, True]}
    for name, backwards in ways.items():
        op = make_block(8, DEFAULTS | forward_type(name) | {"expand": 1.0, "conv": 0, "out_norm": "none"}).eval().op
        x = torch.randn(1, 3, 5, 8)
        u = F.silu(op.in_proj(x)).flatten(1, 2)
        total = torch.zeros_like(u)
        for i, back in enumerate(backwards):
            scan, seen = op.scan, u.flip(1) if back else u
            dt, B, C = (seen @ scan.x_proj[i].t()).split([1, 1, 1], dim=-1)
            A = -scan.A_log[i].exp()
            y, _ = selective_scan(
                seen, dt, A, B, C, scan.D[i], dt_bias=scan.dt_bias[i], dt_proj=scan.dt_proj[i], dt_softplus=True
            )
            total = total + (y.flip(1) if back else y)
        with torch.no_grad():
            torch.testing.assert_close(op(x), op.out_proj(total).view(1, 3, 5, 8), rtol=1e-4, atol=1e-5)


def test_parts_of_the_last_smoothing_are_found():
    model = zoo.create("mamba_fcs_scd_second", dims=[8] * 4, depths=[1] * 4, mlp_ratio=1.0)
    where, _ = zoo.reference("mamba_fcs").place(model, "decoder_T1.smooth_layer_0_semantic.se")
    assert model.get_submodule(where) is model.before.smooth.se


def test_reference_keys_go_both_ways(semantic):
    adapter = zoo.reference("changemamba")
    theirs = adapter.to_reference(semantic.state_dict(), model=semantic)
    assert "decoder_T1.st_block_4_semantic.2.op.A_logs" in theirs
    back = adapter.to_zoo(theirs, model=semantic)
    assert all(torch.equal(back[k], v) for k, v in semantic.state_dict().items())


@pytest.mark.parametrize(
    "stem", ["changemamba__bcd", "changemamba__bda", "mamba_fcs__scd_second", "rsmamba__shuffle_gate", "morpmamba__uh"]
)
def test_runs_hold_the_intermediates_of_the_recorded_files(stem):
    golden = read_golden(GOLDEN / f"{stem}.safetensors")
    adapter = zoo.reference(golden.system)
    model = adapter.build(golden.config, golden.state)
    with torch.no_grad():
        found = adapter.run(model, golden.inputs, call=golden.call)
    assert golden.mids
    for name, expected in golden.mids.items():
        torch.testing.assert_close(found[f"mid/{name}"], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("stem", ["changemamba__bda", "mamba_fcs__scd_second", "rsmamba__forward_cls_head"])
def test_checkpoints_of_parallel_training_show_what_they_are(stem):
    golden = read_golden(GOLDEN / f"{stem}.safetensors")
    state = {f"module.{k}": v for k, v in golden.state.items()}
    model = zoo.reference(golden.system).build(golden.config, state, source=golden.source)
    with torch.no_grad():
        found = zoo.reference(golden.system).run(model, golden.inputs)
    for name, expected in golden.outputs.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_lovasz_by_hand():
    # one pixel of class 0 with p = 0.5, one of class 1 with p = 1: errors 0.5 and 0 -> (0.5 * 1 + 0.5 * 1/2) / 2
    logits = torch.tensor([[0.0, -1e4], [0.0, 1e4]]).view(1, 2, 1, 2)
    assert lovasz_softmax(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(0.375)


@pytest.mark.parametrize(("size", "tile", "overlap"), [((70, 53), 32, 8), ((33, 90), 32, 24), ((20, 20), 32, 0)])
def test_tiles_of_a_pointwise_map_blend_to_the_whole(size, tile, overlap):
    image = torch.rand(2, *size)
    whole, covered, sizes = torch.full((2, *size), torch.nan), torch.zeros(size), set()

    def run(box):
        top, left, height, width = box
        sizes.add((height, width))
        return {"y": image[:, top : top + height, left : left + width] * 2}

    for (top, left, height, width), maps in blended(run, *size, tile, overlap):
        whole[:, top : top + height, left : left + width] = maps["y"]
        covered[top : top + height, left : left + width] += 1
    assert torch.allclose(whole, image * 2, atol=1e-6)
    assert bool((covered == 1).all())
    assert len(sizes) == 1
    assert max(max(sizes)) <= tile


def test_tiles_are_no_larger_than_they_must_be():
    assert [tile_side(size, 512, 64) for size in (300, 512, 513, 960, 1024, 5000)] == [300, 512, 320, 512, 384, 480]
    for size in range(65, 400, 7):
        for overlap in (0, 8, 31):
            wide, even = (starts(size, side, overlap) for side in (64, tile_side(size, 64, overlap)))
            assert len(even) == len(wide)


def test_seams_are_blended_linearly():
    # the first tile says 0, the second 1: over the 8 columns that both see the answer rises evenly
    found = torch.cat(
        [maps["y"] for _, maps in blended(lambda box: {"y": torch.full((1, 32, 32), box[1] / 24)}, 32, 56, 32, 8)],
        dim=2,
    )
    assert torch.allclose(found[0, 5, 24:32], torch.arange(1, 9) / 9)
    assert not found[0, :, :24].any()
    assert bool((found[0, :, 32:] == 1).all())


def test_pair_of_pictures_to_a_map(semantic, tmp_path):
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, 255, (40, 64, 3), dtype=np.uint8) for _ in range(2))
    pipe = zoo.pipeline(semantic, tile=32, overlap=8, pixel_area=100.0)
    found = pipe((before, after))
    assert found.changed.shape == (40, 64)
    assert sum(n for row in found.from_to.values() for n in row.values()) == int(found.changed.sum())
    assert found.hectares == pytest.approx(found.changed.sum() / 100)
    assert not found.before[found.changed == 0].any()
    assert found.save_picture(tmp_path / "map.png").stat().st_size > 0
    with pytest.raises(errors.BadArgument, match="64 x 40 and 40 x 40"):
        pipe((before, after[:, :40]))


@pytest.mark.parametrize(
    ("name", "count"),
    [("second", 7), ("landsat_scd", 5), ("xbd", 5), ("uc_merced", 21), ("aid", 30), ("nwpu_resisc45", 45)],
)
def test_label_sets_are_complete(name, count):
    names = label_set(name)
    assert len(set(names)) == count
    assert len(set(colours(names))) == count
    assert names[0] in {"background", "unchanged", "harbor", "Port", "river"}  # the first of the models' outputs


def test_models_answer_in_the_names_of_their_data_sets():
    small = {"dims": [16, 16, 16, 24], "depths": [1] * 4, "mlp_ratio": 1.0}
    landsat = zoo.pipeline(zoo.create("mamba_fcs_scd_landsat", **small)).layers
    assert landsat["after"] == ["unchanged", "farmland", "desert", "building", "water"]
    damage = zoo.pipeline(zoo.create("changemamba_bda_tiny", **small | {"decoder_dim": 8})).layers
    assert damage["after"][4] == "destroyed"
