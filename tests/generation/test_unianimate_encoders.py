"""Other projects' networks around UniAnimate: tiny ones of transformers, stand-ins for libraries that are absent."""

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from zoo.testing import assert_close
from zoo_generation.unianimate import encoders
from zoo_generation.unianimate.encoders import ClipFeatures, DWPose, StableDiffusionLatents, latents_of
from zoo_generation.unianimate.latents import PatchLatents
from zoo_registry import errors


def test_patches():
    latents, x = PatchLatents(), torch.rand(2, 3, 6, 4) * 2 - 1
    z = latents.encode(x)
    assert z.shape == (2, 4, 3, 2)
    again = latents.decode(z)
    assert_close(torch.nn.functional.avg_pool2d(again, 2), torch.nn.functional.avg_pool2d(x, 2), tolerance=1e-5)
    assert_close(latents.encode(again), z, tolerance=1e-5)  # what is kept is kept
    flat = torch.rand(1, 3, 3, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(latents.decode(latents.encode(flat)), flat, tolerance=1e-5)
    with pytest.raises(ValueError, match="expected even sizes"):
        latents.encode(x[..., :3])


def test_clip_by_transformers(tmp_path):
    """Tiny networks under OpenCLIP's definition: pooled and projected pictures, the prompt's last layer but one."""
    transformers = pytest.importorskip("transformers")
    kind = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "projection_dim": 12}
    text = {**kind, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 9}
    vision = {**kind, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.eval().save_pretrained(tmp_path / "clip")
    features = ClipFeatures(tmp_path / "clip")
    picture = torch.rand(2, 3, 28, 28)
    found = features.picture(picture)
    assert found.shape == (2, 1, 12)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoders.VIT_MEAN, encoders.VIT_STD))
    with torch.no_grad():
        out = model.get_image_features(pixel_values=(picture - mean) / std)
    expected = out if isinstance(out, torch.Tensor) else out.pooler_output
    assert_close(found[:, 0], expected, tolerance=1e-4)
    prompt = features.prompt()
    assert prompt.shape == (1, 9, 16)
    tokens = torch.tensor([[48, 49, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        states = model.text_model(tokens, output_hidden_states=True).hidden_states
        assert_close(prompt, model.text_model.final_layer_norm(states[2]), tolerance=1e-5)


def test_the_autoencoder(tmp_path, monkeypatch):
    """Scaled, some frames at a time, drawn from the distribution or its mean."""

    class Distribution:
        def __init__(self, mean):
            self.mean = mean

        def mode(self):
            return self.mean

        def sample(self, generator=None):
            return self.mean + torch.randn(self.mean.shape, generator=generator)

    class AutoencoderKL(torch.nn.Module):
        sizes: ClassVar[list[int]] = []

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        @classmethod
        def from_single_file(cls, path):
            return cls()

        from_pretrained = from_single_file

        def encode(self, x):
            self.sizes.append(len(x))
            mean = torch.nn.functional.avg_pool2d(x, 8)
            return types.SimpleNamespace(latent_dist=Distribution(torch.cat([mean, mean[:, :1]], 1)))

        def decode(self, z):
            return types.SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=AutoencoderKL))
    (tmp_path / "a.ckpt").write_bytes(b"")
    x = torch.rand(5, 3, 16, 8) * 2 - 1
    latents = StableDiffusionLatents(tmp_path / "a.ckpt", sampled=False)
    z = latents.encode(x)
    assert AutoencoderKL.sizes == [2, 2, 1]
    assert_close(z[:, :3], 0.18215 * torch.nn.functional.avg_pool2d(x, 8), tolerance=1e-5)
    assert_close(latents.decode(z), torch.nn.functional.interpolate(z[:, :3] / 0.18215, scale_factor=8), tolerance=1e-5)
    drawn = [StableDiffusionLatents(tmp_path).encode(x, torch.manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], z)


def test_poses_of_pictures(tmp_path, monkeypatch):
    """The libraries' networks get blue, green, red, and of several people the first is taken."""
    seen = []

    class Tool:
        def __init__(self, path, model_input_size, backend, device, to_openpose=False):
            assert not to_openpose

    class YOLOX(Tool):
        def __call__(self, image):
            seen.append(image[0, 0].tolist())
            return [[0, 0, 10, 20], [5, 5, 10, 10]]

    class RTMPose(Tool):
        def __call__(self, image, bboxes):
            points = np.stack([np.full((133, 2), 5.0), np.full((133, 2), 9.0)])
            return points[: len(bboxes)], np.full((2, 133), 0.8)

    monkeypatch.setitem(sys.modules, "rtmlib", types.SimpleNamespace(YOLOX=YOLOX, RTMPose=RTMPose))
    for name in ("yolox_l.onnx", "dw.onnx"):
        (tmp_path / name).write_bytes(b"")
    detector = DWPose(tmp_path / "yolox_l.onnx", tmp_path / "dw.onnx")
    picture = np.zeros((20, 10, 3), np.uint8)
    picture[0, 0] = [1, 2, 3]
    found = detector([picture, picture])
    assert seen == [[3, 2, 1]] * 2
    assert len(found) == 2
    assert np.allclose(found.body[:, 0], [0.5, 0.25])
    with pytest.raises(ValueError, match="2 sizes"):
        detector([picture, picture[:5]])


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(errors.BadArgument, match="give autoencoder=PATH"):
        latents_of("autoencoder", None)
    with pytest.raises(ValueError, match="latents is 'wavelets'"):
        latents_of("wavelets", None)
    for module, make, extra in (
        ("diffusers", lambda: StableDiffusionLatents(tmp_path), "autoencoder"),
        ("transformers", lambda: ClipFeatures(tmp_path), "autoencoder"),
        ("rtmlib", lambda: DWPose(tmp_path, tmp_path), "pose"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(errors.MissingExtra, match=rf"ssm-zoo-generation\[{extra}\]"):
            make()
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace())
    with pytest.raises(errors.LocalFileMissing, match=r"v2-1_512-ema-pruned\.ckpt"):
        StableDiffusionLatents(tmp_path / "nothing.ckpt")
