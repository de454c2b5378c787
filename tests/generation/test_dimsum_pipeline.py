"""Labels in, images out: the pipeline, latents with and without an autoencoder, training, validation, commands."""

import builtins
import json
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import zoo
import zoo.testing
from zoo import errors
from zoo_generation.dimsum import flow, training
from zoo_generation.dimsum.autoencoder import Autoencoder
from zoo_generation.dimsum.commands import generate_images, train_images
from zoo_generation.dimsum.images import read_folder, read_picture
from zoo_generation.dimsum.pipeline import ImageGeneration

NAMES = ["disc", "ring", "crane, a bird", "cross"]
TINY = {"img_resolution": 8, "hidden_size": 16, "depth": 1, "num_classes": 4, "zero_init": False}


def model(channels=1, **more):
    torch.manual_seed(0)
    return zoo.create("dimsum_micro", in_channels=channels, **{**TINY, **more})


def generator(m=None, **more):
    return ImageGeneration(m or model(), method="euler", steps=3, labels=NAMES, **more)


@pytest.fixture
def diffusers(monkeypatch):
    """A stand-in for diffusers: an autoencoder that averages, and copies, 8 x 8 pixels."""

    class AutoencoderKL(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.one = name, nn.Parameter(torch.ones(()))

        @classmethod
        def from_pretrained(cls, name):
            return cls(name)

        def decode(self, z):
            return types.SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

        def encode(self, x):
            small = nn.functional.avg_pool2d(x, 8)
            latent = torch.cat([small, small[:, :1]], 1)
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(sample=lambda generator: latent))

    module = types.ModuleType("diffusers")
    module.AutoencoderKL = AutoencoderKL
    monkeypatch.setitem(sys.modules, "diffusers", module)


@pytest.fixture
def no_diffusers(monkeypatch):
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name, *a: real(name) if name != "diffusers" else refuse())
    monkeypatch.setattr(
        "zoo_registry.extras.import_module", lambda name: refuse() if name == "diffusers" else real(name)
    )


def refuse():
    raise ImportError("no diffusers here")


# -- which labels


@pytest.mark.parametrize(
    ("asked", "classes"),
    [
        ("ring", [1]), ("RING, cross", [1, 3]), ("crane, a bird", [2]), ("2,0", [2, 0]), ("all", [0, 1, 2, 3]),
        ("none", [4]), (3, [3]), (None, [4]), ((0, "ring", "none"), [0, 1, 4]),
    ],
)  # fmt: skip
def test_labels(asked, classes):
    assert generator().read(asked) == classes
    assert generator(count=2).read(asked) == [c for c in classes for _ in range(2)]


def test_labels_of_a_file(tmp_path):
    path = tmp_path / "wanted.txt"
    path.write_text("ring\n\n# a comment\n3  # the cross\nnone\n", encoding="utf-8")
    assert generator().read(path) == [1, 3, 4]
    path.write_text("\n# nothing\n", encoding="utf-8")
    with pytest.raises(errors.BadArgument, match="holds no label"):
        generator().read(path)


def test_no_labels():
    for nothing in ((), {}):
        with pytest.raises(errors.BadArgument, match="no label is given"):
            zoo.pipeline("dimsum_micro")(nothing)


def test_names_of_imagenet(monkeypatch):
    pytest.importorskip("timm")
    names = generator().named_labels("imagenet-1k")
    assert len(names) == 1000
    assert names[207] == "golden retriever"
    assert generator().named_labels("cifar") is None
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(errors.MissingExtra, match=r"ssm-zoo-generation\[imagenet\]' \(or give numbers\)"):
        generator().named_labels("imagenet-1k")


def test_wrong_labels():
    with pytest.raises(errors.BadArgument, match="there is no class 'rings'; did you mean ring"):
        generator().read("rings")
    with pytest.raises(errors.BadArgument, match="the class is 4; expected 0 to 3"):
        generator().read("4")
    unnamed = ImageGeneration(model())
    with pytest.raises(errors.BadArgument, match="expected a number from 0 to 3, or none"):
        unnamed.read("ring")
    for options, words in (
        ({"count": 0}, "count is 0"),
        ({"method": "rk4"}, "method is 'rk4'; expected one of dopri5"),
        ({"steps": 0}, "steps is 0"),
    ):
        with pytest.raises(errors.BadArgument, match=words):
            ImageGeneration(model(), **options)
    with pytest.raises(errors.BadArgument, match="Linear generates no images"):
        ImageGeneration(nn.Linear(1, 1))


# -- images


def test_images_of_a_model_of_pixels():
    m = model()
    answer = generator(m, seed=5, cfg=2.0)("ring, none")
    assert answer.labels == ["ring", "none"]
    assert answer.images.shape == (2, 8, 8)
    assert answer.evaluations == 3
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    wanted = flow.sample(m, noise, torch.tensor([1, 4]), null=4, method="euler", steps=3, cfg=2.0)
    np.testing.assert_allclose(answer.latents, wanted.numpy(), rtol=1e-5, atol=1e-6)
    pixels = ((wanted.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert np.array_equal(answer.images, pixels[:, 0].numpy())
    assert "2 images of 8 x 8 (ring, none), 3 evaluations" in str(answer)
    assert json.dumps(answer.to_dict())


def test_an_image_hangs_on_its_seed_alone():
    pipe = generator(seed=1)
    together = pipe("ring, ring").images
    assert not np.array_equal(*together)
    assert np.array_equal(generator(seed=2)("ring").images[0], together[1])
    few = generator(seed=1, images_at_once=1)("ring, ring").images
    assert np.array_equal(few, together)
    both = pipe(["ring", "cross"], batch_size=2)
    assert np.array_equal(both[0].images[0], together[0])
    assert [a.labels for a in both] == [["ring"], ["cross"]]


def test_pictures(tmp_path):
    answer = generator(model(3))("all")
    assert answer.images.shape == (4, 8, 8, 3)
    picture = answer.picture()
    assert picture.size == (18 * 12, 18 * 12)
    assert np.array_equal(np.asarray(picture)[:96:12, :96:12], answer.images[0])
    files = answer.save(tmp_path)
    assert [f.name for f in files] == ["000_disc.png", "001_ring.png", "002_crane__a_bird.png", "003_cross.png"]
    assert np.array_equal(np.asarray(Image.open(files[3])), answer.images[3])


def test_half_precision_models_are_solved_in_float32():
    exact = generator(model())("ring").latents
    rough = generator(model().to(torch.bfloat16))("ring").latents
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.2


# -- latents


def test_latents_are_decoded(diffusers):
    answer = generator(model(4))("ring")
    assert answer.latents.shape == (1, 4, 8, 8)
    assert answer.images.shape == (1, 64, 64, 3)
    wanted = np.clip(answer.latents[0, :3] / 0.18215, -1, 1)
    np.testing.assert_allclose(answer.images[0, ::8, ::8].transpose(2, 0, 1), (wanted + 1) * 127.5, atol=0.51)
    coder = Autoencoder("some/folder")
    assert coder.network.name == "some/folder"
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(coder.encode(image)[:, 0, 0, 0], image[:, 0, :8, :8].mean((1, 2)) * 0.18215)


def test_without_diffusers_latents_remain(no_diffusers, tmp_path):
    with pytest.raises(errors.MissingExtra, match=r"pip install 'ssm-zoo-generation\[autoencoder\]' \(or ask for"):
        generator(model(4))("ring")
    answer = generator(model(4), decode=False)("ring, ring")
    assert answer.images is None
    assert answer.picture() is None
    assert "2 latents of 4 x 8 x 8" in answer.summary()
    assert np.array_equal(np.load(answer.save(tmp_path)[0]), answer.latents)


# -- folders, training, validation


@pytest.fixture
def pictures(tmp_path):
    """Light and dark pictures, 12 each, not square."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            image = rng.integers(low, low + 50, (10, 14)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_folders(pictures, tmp_path):
    found = read_folder(pictures, 8, 1)
    assert found.images.shape == (24, 1, 8, 8)
    assert found.classes == ["dark", "light"]
    assert found.images[found.labels == 0].mean() < -0.7 < 0.7 < found.images[found.labels == 1].mean()
    first, second = found.split(0.25, seed=1)
    assert (len(first), len(second)) == (18, 6)
    plain = read_folder(pictures / "dark", 8, 3)
    assert plain.labels is None
    assert plain.images.shape == (12, 3, 8, 8)
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 255  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 4, 1).tolist() == [[[1.0] * 4] * 4]
    (pictures / "dark" / "bad.png").write_bytes(b"no picture")
    for call, words in (
        (lambda: read_folder(pictures, 8, 1), r"bad\.png is no picture that can be read"),
        (lambda: read_folder(tmp_path / "nowhere", 8, 1), "there is no folder"),
        (lambda: read_folder(pictures / "light", 8, 1).split(0.99), "at least 2 are needed"),
        (lambda: read_folder(pictures / "light", 8, 1).split(2.0), "the share of images to keep apart is 2.0"),
        (lambda: read_folder(pictures, 8, 1, ["dark"]), "has the class 'light', which is none of dark"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_training_learns_and_resumes_from_a_seed():
    images = torch.cat([torch.full((20, 1, 8, 8), v) for v in (-0.9, 0.9)]) + 0.02 * torch.randn(40, 1, 8, 8)
    labels = torch.arange(40) // 20
    settings = training.Settings(steps=60, batch_size=16, learning_rate=5e-3, decay=0.9, warmup=5, report_every=30)
    found = []
    for _ in range(2):
        m = model(num_classes=2, zero_init=True)
        history = training.fit(m, images, labels, settings, held_out=(images, labels))
        found.append([row["held_out"] for row in history.rows])
        assert not m.training
    assert found[0] == found[1]
    assert found[0][1] < found[0][0] < training.held_out_loss(model(num_classes=2, zero_init=True), images, labels)
    bright = ImageGeneration(m, method="heun", steps=10)("0, 1").latents.mean((1, 2, 3))
    assert bright[0] < -0.5 < 0.5 < bright[1]


def test_an_interrupted_run_goes_on(tmp_path):
    """After Ctrl-C as well, which keeps the average so far."""
    images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) // 5
    settings = training.Settings(steps=6, batch_size=4, learning_rate=1e-2, decay=0.9, flip=True, report_every=1)

    def trained(run, report):
        m = model(num_classes=2)
        history = training.fit(m, images, labels, settings, held_out=(images, labels), on_report=report, run=run)
        assert [row["step"] for row in history.rows] == list(range(1, len(history.rows) + 1))
        if history.interrupted:
            raise KeyboardInterrupt
        return m

    zoo.testing.check_resume(trained, tmp_path, after=3)


def test_the_average_follows_slowly():
    m = model()
    start = {k: v.clone() for k, v in m.named_parameters() if v.requires_grad}
    settings = training.Settings(steps=1, batch_size=4, learning_rate=1e-2, decay=0.0)
    training.fit(m, torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long), settings)
    moved = [not torch.equal(v, start[k]) for k, v in m.named_parameters() if v.requires_grad]
    assert sum(moved) > 0.8 * len(moved)
    assert settings.rate(0) == 1e-2
    falling = training.Settings(steps=100, learning_rate=1.0, cosine=True, warmup=9)
    assert falling.rate(0) == pytest.approx(0.1)
    assert falling.rate(50) == pytest.approx(0.5)
    for options, words in (({"steps": 0}, "steps is 0"), ({"decay": 1.0}, "decay is 1.0")):
        with pytest.raises(ValueError, match=words):
            training.Settings(**options)


def test_flips_and_epochs():
    images = torch.arange(6.0).view(6, 1, 1, 1) + torch.tensor([0.0, 0.25]).view(1, 1, 1, 2)
    batches = training.batches(images, None, training.Settings(batch_size=4, flip=True))
    seen = torch.cat([next(batches)[0] for _ in range(20)])
    assert 10 < int((seen[..., 0] > seen[..., 1]).sum()) < 70


def test_commands(pictures, tmp_path):
    runner = CliRunner()
    out = tmp_path / "trained"
    options = ["--steps", "4", "--batch-size", "8", "--report-every", "2", "--set", "img_resolution=8", "--set",
               "hidden_size=16", "--set", "depth=1", "--out", str(out)]  # fmt: skip
    done = runner.invoke(train_images, ["dimsum_micro", str(pictures), *options], catch_exceptions=False)
    assert f"saved to {out}" in done.output
    asked = [str(out), "light", "dark", "--count", "2", "--method", "heun", "--steps", "2"]
    picture = tmp_path / "grid.png"
    done = runner.invoke(generate_images, [*asked, "--out", str(picture), "--json"], catch_exceptions=False)
    found = json.loads(done.output)
    assert found["labels"] == ["light", "light", "dark", "dark"]
    assert found["evaluations"] == 4
    assert Image.open(picture).size == (216, 216)
    done = runner.invoke(generate_images, [*asked, "--out", str(tmp_path / "files")], catch_exceptions=False)
    assert "4 files in" in done.output
    labels = tmp_path / "labels.txt"
    labels.write_text("dark\n", encoding="utf-8")
    done = runner.invoke(
        generate_images, [str(out), str(labels), "--latents", "--out", str(tmp_path / "l")], catch_exceptions=False
    )
    assert [f.name for f in (tmp_path / "l").iterdir()] == ["000_dark.png"]  # of pixels there is nothing to decode
    assert done.exit_code == 0
    measured = zoo.validate(str(out), pictures)
    assert measured.samples == 24
    assert set(measured.metrics) == {"loss", "loss without labels"}
    again = runner.invoke(
        train_images,
        ["dimsum_micro", str(pictures), *options[:-1], str(tmp_path / "b"), "--start", str(out / "model.safetensors")],
        catch_exceptions=False,
    )
    assert again.exit_code == 0


def test_images_without_a_label(tmp_path):
    quick = ["--method", "euler", "--steps", "1", "--json", "--out", str(tmp_path / "a.png")]
    for asked in ([], ["none"]):
        done = CliRunner().invoke(generate_images, ["dimsum_micro", *asked, *quick], catch_exceptions=False)
        assert json.loads(done.output)["labels"] == ["none"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--out", "a.xyz"], errors.BadArgument, r"a\.xyz ends in '\.xyz'; expected \.png"),
        (["--out", "file/a.png"], errors.StoreError, "cannot be written"),
        (["--out", "a.png", "--cfg", "nan"], errors.BadArgument, "cfg is nan"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ImageGeneration, "forward", lambda *_: pytest.fail("the work was done first"))
    with pytest.raises(error, match=message):
        CliRunner().invoke(generate_images, ["dimsum_micro", "ring", *options], catch_exceptions=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_latents_go_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["dimsum_micro", "ring", "--method", "euler", "--steps", "1", "--latents"]
    done = CliRunner().invoke(generate_images, quick, catch_exceptions=False)
    assert done.exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]  # and none that is called generated.png
    done = CliRunner().invoke(generate_images, [*quick, "--out", "a.png"])
    assert done.exit_code == 2
    assert "expected a folder for --latents" in done.output


def test_training_commands_refuse_other_models(pictures):
    done = CliRunner().invoke(train_images, ["unianimate_micro", str(pictures)])
    assert done.exit_code == 2
    assert "unianimate_micro generates no images from labels" in done.output


def test_training_on_latents(pictures, tmp_path, diffusers):
    options = ["--steps", "2", "--batch-size", "4", "--set", "in_channels=4", "--set", "img_resolution=8", "--set",
               "hidden_size=16", "--set", "depth=1", "--out", str(tmp_path / "latent")]  # fmt: skip
    done = CliRunner().invoke(train_images, ["dimsum_micro", str(pictures), *options], catch_exceptions=False)
    assert done.exit_code == 0
    answer = zoo.pipeline(str(tmp_path / "latent"), method="euler", steps=2)("dark")
    assert answer.images.shape == (1, 64, 64, 3)


def test_without_labels(pictures, tmp_path):
    options = ["--steps", "2", "--batch-size", "4", "--set", "img_resolution=8", "--set", "hidden_size=16", "--set",
               "depth=1", "--out", str(tmp_path / "plain")]  # fmt: skip
    done = CliRunner().invoke(train_images, ["dimsum_micro", str(pictures / "dark"), *options], catch_exceptions=False)
    assert "none" in done.output
    answer = zoo.pipeline(str(tmp_path / "plain"), method="euler", steps=2, cfg=3.0)("none")
    assert answer.labels == ["none"]
    assert answer.evaluations == 2
