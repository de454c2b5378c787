"""RSMamba's shuffles and class tokens; hyperspectral cubes to class maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import zoo
from zoo.reference import read_golden
from zoo_registry import errors
from zoo_remote_sensing.hyperspectral import principal_components, windows
from zoo_remote_sensing.rsmamba import MultiPathMamba, PatchEmbed, RSMamba

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"arch": None, "dim": 8, "depth": 2, "num_classes": 3, "img_size": (24, 24), "patch_size": 8, "stride": 8}


def test_shuffles_are_new_at_every_call_unless_fixed():
    torch.manual_seed(0)
    model = RSMamba(**TINY).eval()
    image = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))
        model.shuffle_seed = 1
        assert torch.equal(model(image), model(image))
    with pytest.raises(ValueError, match="orders"):
        model(image, torch.arange(9)[None])


def test_the_middle_token_of_odd_patches_is_a_patch():
    # 9 patches: the class token stands at 4, the original takes position 5
    torch.manual_seed(0)
    model = RSMamba(**TINY | {"cls_position": "middle", "out_type": "cls_token", "path_type": "forward"}).eval()
    x = torch.arange(10.0).view(1, 10, 1)
    assert model.take(x, (3, 3)).item() == 5


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="head_tail"):
        RSMamba(**TINY | {"cls_position": "head_tail"})
    with pytest.raises(ValueError, match="class token"):
        RSMamba(**TINY | {"out_type": "cls_token"})
    with pytest.raises(ValueError, match="resize the image"):
        RSMamba(**TINY)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "size", "grid", "margins"),  # margins: left, right, above, below
    [
        ({"stride": 4}, (21, 18), (6, 5), (0, 6, 0, 7)),
        ({"stride": (4, 8), "padding": "same"}, (21, 18), (6, 3), (3, 3, 3, 4)),
        ({"stride": 4, "padding": 1}, (21, 18), (4, 4), (1, 1, 1, 1)),
        ({"stride": 4, "padding": (2, 0), "dilation": 2}, (21, 18), (3, 1), (0, 0, 2, 2)),
    ],
)
def test_patches_are_padded_as_asked(settings, size, grid, margins):
    torch.manual_seed(0)
    embed = PatchEmbed(2, 8, 8, bias=True, norm_eps=1e-5, **settings)
    image = torch.randn(1, 2, *size)
    tokens, found = embed(image)
    stride, dilation = settings["stride"], settings.get("dilation", 1)
    expected = F.conv2d(F.pad(image, margins), embed.proj.weight, embed.proj.bias, stride, dilation=dilation)
    assert found == embed.grid(*size) == grid == tuple(expected.shape[2:])
    expected = F.layer_norm(expected.flatten(2).transpose(1, 2), (8,), eps=1e-5)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_a_wide_convolution_is_the_narrow_one_with_zeros_in_front():
    torch.manual_seed(0)
    narrow, wide = (MultiPathMamba(8, 16, conv=k) for k in (5, 11))
    state = narrow.state_dict()
    wide.load_state_dict(state | {"conv1d.weight": F.pad(state["conv1d.weight"], (6, 0))})
    x, order = torch.randn(2, 20, 8), torch.stack([torch.arange(20), torch.arange(20).flip(0), torch.randperm(20)])
    torch.testing.assert_close(wide.by_path(x, order), narrow.by_path(x, order), rtol=1e-4, atol=1e-5)


def test_the_originals_settings_of_patches_norms_and_activations():
    adapter = zoo.reference("rsmamba")
    backbone = {
        "arch": {"embed_dims": 8, "num_layers": 1, "feedforward_channels": 16}, "img_size": 24, "patch_size": 8,
        "path_type": "forward", "norm_cfg": {"type": "LN"}, "layer_cfgs": {"hidden_act": "gelu_new"},
        "patch_cfg": {"padding": "same", "bias": True, "norm_cfg": {"type": "LN", "eps": 1e-3}, "stride": [8, 4]},
    }  # fmt: skip
    plain = RSMamba(
        **TINY | {"depth": 1, "hidden": 16, "path_type": "forward", "stride": (8, 4), "norm_eps": 1e-5},
        patch={"padding": "same", "bias": True, "norm_eps": 1e-3}, mixer={"act": "gelu_pytorch_tanh"},
    ).eval()  # fmt: skip
    state = adapter.to_reference(plain.state_dict(), model=plain)
    assert {"backbone.patch_embed.projection.bias", "backbone.patch_embed.norm.weight"} <= state.keys()
    model = adapter.build({"backbone": backbone, "num_classes": 3}, state)
    assert {m.eps for m in (model.pre_norm, model.final_norm, model.out_norm)} == {1e-5}  # MMPretrain's where none is
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(adapter.run(model, {"image": image})["logits"], plain(image))
    with pytest.raises(ValueError, match="classifier has no 'num_clases'"):
        adapter.build({"backbone": backbone, "num_clases": 3}, state)
    with pytest.raises(ValueError, match="norm_cfg is"):
        adapter.build({"backbone": {**backbone, "norm_cfg": {"type": "BN"}}, "num_classes": 3}, state)


def test_intermediates_of_keras_layers_hold_their_activation_and_axes(tmp_path):
    golden = read_golden(GOLDEN / "morpmamba__uh.safetensors")
    layers = {
        "dense": "dense", "classifier": "classifier", "query": "multi_head_attention.query", "nothing": "dropout",
        "gate": "feature_enhancement.spatial_gate", "erosion": "token_generation.erosion_layer_spectral",
    }  # fmt: skip
    tensors = {f"state/{k}": v for k, v in golden.state.items()} | {f"mid/{k}": torch.zeros(1) for k in layers}
    meta = {"system": "morpmamba", "config": json.dumps(golden.config), "mids": json.dumps(layers)}
    save_file(tensors | {"in/patch": golden.inputs["patch"]}, tmp_path / "file.safetensors", metadata=meta)
    found = zoo.reference("morpmamba").replay(tmp_path / "file.safetensors")
    assert "mid/nothing" not in found  # no module of ours computes it: the rest is compared all the same
    assert torch.equal(found["mid/classifier"], found["out/probabilities"])
    assert found["mid/query"].shape == (3, 4, 4, 16)
    assert found["mid/erosion"].shape == (3, 9, 4, 4)
    spatial = golden.mids["feature_enhancement.0"] / golden.mids["token_generation.0"]
    torch.testing.assert_close(found["mid/gate"][:, :, None].expand_as(spatial), spatial, rtol=1e-3, atol=1e-4)
    logits = found["mid/dense"] @ golden.state["classifier.kernel"] + golden.state["classifier.bias"]
    torch.testing.assert_close(logits.softmax(-1), golden.outputs["probabilities"], rtol=1e-4, atol=1e-6)


def test_kernels_of_another_shape_are_named():
    golden = read_golden(GOLDEN / "morpmamba__uh.safetensors")
    kernel = "token_generation.erosion_layer_spatial.depthwise_conv.0.depthwise_kernel"
    with pytest.raises(ValueError, match="depthwise kernel has shape"):
        zoo.reference("morpmamba").build(golden.config, golden.state | {kernel: torch.zeros(3, 3, 1, 1)})


def test_windows_hold_the_pixel_at_their_middle():
    image = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    found = windows(image, 4)
    assert found.shape == (3, 4, 4, 4, 1)
    assert np.array_equal(found[:, :, 2, 2], image)
    assert not found[0, 0, :2].any()
    assert found[0, 0, 2, 3, 0] == 1


def test_components_are_white():
    cube = np.random.default_rng(0).normal(size=(9, 8, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5])
    found = principal_components(cube.astype(np.float32), 3).reshape(-1, 3)
    assert np.allclose(np.cov(found.T), np.eye(3), atol=1e-4)


def test_cube_to_map(tmp_path):
    from scipy.io import savemat

    torch.manual_seed(0)
    model = zoo.create("morpmamba_houston", bands=4, dim=8, state=8).eval()
    cube = np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32)
    savemat(tmp_path / "cube.mat", {"scene": cube})
    pipe = zoo.pipeline(model, rows=4)
    found = pipe(tmp_path / "cube.mat")
    assert found.classes.shape == (6, 5)
    assert sum(found.counts.values()) == 30
    assert np.array_equal(pipe(cube).classes, found.classes)
    with pytest.raises(errors.BadArgument, match="at least 4 bands"):
        pipe(cube[:, :, :3])


@pytest.fixture
def spectra():
    torch.manual_seed(0)
    return zoo.create("morpmamba_houston", bands=4, dim=8, state=8, num_classes=3).eval()


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_envi_scenes(spectra, tmp_path, interleave):
    rasterio = pytest.importorskip("rasterio")
    cube = np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32)
    place = {"crs": "EPSG:32615", "transform": rasterio.transform.from_origin(271_000, 3_290_000, 2.5, 2.5)}
    with rasterio.open(
        tmp_path / "scene.dat", "w", driver="ENVI", height=6, width=5, count=10, dtype="float32",
        interleave=interleave, **place,
    ) as file:  # fmt: skip
        file.write(cube.transpose(2, 0, 1))
    assert (tmp_path / "scene.hdr").exists()
    pipe = zoo.pipeline(spectra, class_names=["grass", "trees", "soil"])
    found = pipe(tmp_path / "scene.hdr")
    assert np.array_equal(found.classes, pipe(cube).classes)
    assert set(found.counts) <= {"grass", "trees", "soil"}
    with rasterio.open(found.save(tmp_path / "map.tif")) as written:
        assert written.transform == place["transform"]
        assert np.array_equal(written.read(1), found.classes)
    (tmp_path / "scene.dat").unlink()
    with pytest.raises(errors.BadArgument, match="no data file beside it"):
        pipe(tmp_path / "scene.hdr")


def test_maps_are_saved_as_picture_and_array(spectra, tmp_path):
    from PIL import Image

    np.save(tmp_path / "scene.npy", np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32))
    found = zoo.pipeline(spectra)(tmp_path / "scene.npy")
    assert np.array_equal(np.load(found.save(tmp_path / "map.npy")), found.classes)
    assert np.array_equal(np.asarray(Image.open(found.save(tmp_path / "map.png"))), found.classes)


def test_pixels_without_data_have_no_class(spectra, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    holes = np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32)
    holes[:, 3:] = np.nan
    found = zoo.pipeline(spectra)(holes)
    assert (found.classes[:, 3:] == 255).all()
    assert (found.classes[:, :3] < 3).all()
    assert sum(found.counts.values()) == 18
    assert found.picture().getpixel((4, 0)) == 255
    inside = principal_components(holes, 4, ~np.isnan(holes[..., 0]))
    np.testing.assert_allclose(inside[:, :3], principal_components(holes[:, :3], 4), atol=1e-6)
    assert not inside[:, 3:].any()
    holes[:, 3:] = -9999
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", height=6, width=5, count=10, dtype="float32", nodata=-9999
    ) as file:
        file.write(holes.transpose(2, 0, 1))
    assert np.array_equal(zoo.pipeline(spectra)(tmp_path / "scene.tif").classes, found.classes)
    with pytest.raises(errors.BadArgument, match="no pixel"):
        zoo.pipeline(spectra)(np.full((6, 5, 10), np.nan, np.float32))


def test_components_beyond_the_rank_are_zero():
    few = np.random.default_rng(0).normal(size=(9, 8, 2)) @ np.random.default_rng(1).normal(size=(2, 6))
    found = principal_components(few, 4)
    np.testing.assert_allclose(found[..., :2].std((0, 1)), 1, atol=0.01)
    assert not found[..., 2:].any()
    assert not principal_components(np.ones((3, 3, 6), np.float32), 3).any()


def test_components_do_not_depend_on_the_blocks(monkeypatch):
    cube = np.random.default_rng(0).normal(7, 3, size=(9, 8, 6)).astype(np.float32)
    whole = principal_components(cube, 4)
    monkeypatch.setattr("zoo_remote_sensing.hyperspectral.BLOCK", 5)
    np.testing.assert_allclose(principal_components(cube, 4), whole, atol=1e-5)


def test_cubes_that_cannot_be_read(spectra, tmp_path):
    pipe = zoo.pipeline(spectra)
    for name in ("a.npy", "a.mat", "a.npz", "a.hdr"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises((errors.BadFile, errors.BadArgument), match=name.replace(".", r"\.")):
            pipe(tmp_path / name)
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(errors.BadFile, match="Python objects"):
        pipe(tmp_path / "a.npy")
    with pytest.raises(errors.LocalFileMissing, match="no file"):
        pipe.read(tmp_path / "none.npy")
    with pytest.raises(errors.BadArgument, match="expected a model of cubes"):
        zoo.pipeline("changemamba_micro.scenes", "pixel-classification")
    for wrong in (np.zeros((6, 5, 10), complex), np.zeros((6, 5)), np.zeros((0, 5, 10))):
        with pytest.raises(errors.BadArgument, match="expected numbers"):
            pipe(wrong)
    cube = np.random.default_rng(0).normal(size=(6, 5, 10)).astype(np.float32)
    np.savez(tmp_path / "a.npz", small=cube[:2], cube=cube)
    found = pipe(tmp_path / "a.npz")
    assert np.array_equal(found.classes, pipe(cube).classes)
    with pytest.raises(errors.BadArgument, match=r"ends in '\.jpg'; expected \.tif"):
        found.save(tmp_path / "map.jpg")
    with pytest.raises(errors.BadArgument, match="class_names has 2 names; the model has 3"):
        zoo.pipeline(spectra, class_names=["a", "b"])
