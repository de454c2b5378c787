"""From image files to answers, tables, vectors and pictures; validation on a folder; the verbs as a user types them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.cli import run
from zoo_vision.contributions import scan_contributions
from zoo_vision.pipelines import ImageClassification, embed, open_image, transform_settings, write_csv
from zoo_vision.validation import validate_folder

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline("vim_micro.digits", top_k=3)


def as_folders(target, names=None):
    """The ten sample digits as target/CLASS/IMAGE."""
    for file in sorted(DIGITS.glob("*.png")):
        name = file.stem[-1]
        folder = target / (names[int(name)] if names else name)
        folder.mkdir(parents=True)
        (folder / file.name).write_bytes(file.read_bytes())
    return target


def test_the_demo_reads_the_held_out_samples(pipe):
    results = pipe(DIGITS, batch_size=4)
    assert [r.label for r in results] == [str(i) for i in range(10)]
    assert all(len(r.labels) == 3 and 0 < r.confidence <= 1 for r in results)
    assert str(results[3]).startswith(str(DIGITS / "digit_3.png") + ": 3 ")


def test_the_demo_reads_dark_ink_on_light_paper(pipe):
    results = pipe([Image.eval(Image.open(f), lambda v: 255 - v) for f in sorted(DIGITS.glob("*.png"))])
    assert sum(r.label == str(i) for i, r in enumerate(results)) >= 9


def test_one_image_in_every_form_gives_one_answer(pipe):
    path = DIGITS / "digit_8.png"
    image = Image.open(path)
    forms = [path, str(path), image, image.convert("RGB"), image.convert("RGBA"), np.asarray(image),
             pipe.prepare(pipe.read(path))]  # fmt: skip
    probabilities = [pipe(form).probabilities for form in forms]
    for found in probabilities[1:]:
        np.testing.assert_allclose(found, probabilities[0], atol=1e-2)  # RGB to grey rounds


def test_pictures_are_turned_upright_and_deep_greys_are_read(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", 3).size == (10, 20)
    deep = np.linspace(0, 60000, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = np.asarray(open_image(tmp_path / "deep.png", 1))
    assert grey.dtype == np.uint8
    assert (grey.min(), grey.max()) == (0, 255)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(open_image(clear, 3)).min() == 255  # transparent is white, not black


def test_bad_inputs_are_named(pipe, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(zoo.errors.BadArgument, match="not an image that can be read"):
        pipe(tmp_path / "text.png")
    with pytest.raises(zoo.errors.BadArgument, match="expected uint8"):
        pipe(np.zeros((4, 4)))
    with pytest.raises(zoo.errors.BadArgument, match=r"expected \(1, height, width\)"):
        pipe(torch.zeros(3, 32, 32))
    with pytest.raises(zoo.errors.BadArgument, match="expected a file"):
        pipe(3.5)
    with pytest.raises(zoo.errors.BadArgument, match="top_k"):
        ImageClassification(pipe.model, top_k=0)
    with pytest.raises(zoo.errors.BadArgument, match="5 channels"):
        ImageClassification(zoo.create("vim_micro", in_chans=5))
    with pytest.raises(zoo.errors.BadArgument, match="no vector of logits"):
        ImageClassification(zoo.create("vim_micro", features_only=True))(DIGITS / "digit_1.png")


def test_settings_follow_the_weights_and_the_model():
    weights = zoo.info("vim_tiny.in1k")
    assert weights  # the card is known without its bytes
    settings = transform_settings(zoo.create("vim_tiny", depth=1), {})
    assert settings["input_size"] == (3, 224, 224)
    assert (settings["crop_pct"], settings["interpolation"]) == (0.875, "bicubic")
    larger = transform_settings(zoo.create("vim_tiny", depth=1, img_size=(96, 64)), {"input_size": [3, 224, 224]})
    assert larger["input_size"] == (3, 96, 64)
    grey = transform_settings(zoo.create("vim_tiny", depth=1, in_chans=1), {})
    assert len(grey["mean"]) == len(grey["std"]) == 1


def test_imagenet_labels_come_from_timm():
    pipe = ImageClassification(zoo.create("vim_micro"))
    names = pipe.named_labels("imagenet-1k")
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert len(pipe.named_labels("imagenet-12k")) == 11821
    assert pipe.named_labels("ade20k") is None


def test_csv_has_one_line_an_image_and_says_what_failed(pipe, tmp_path):
    (tmp_path / "a.png").write_bytes((DIGITS / "digit_1.png").read_bytes())
    (tmp_path / "b.png").write_text("no image")
    results = pipe(tmp_path, keep_going=True)
    with write_csv(results, tmp_path / "out" / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label_1"] for row in rows] == ["1", ""]
    assert "not an image" in rows[1]["error"]


def test_contributions_are_measured_and_drawn(pipe, tmp_path):
    model = pipe.model
    x = pipe.prepare(pipe.read(DIGITS / "digit_5.png"))[None]
    parts = scan_contributions(model, x)
    assert parts.names == ["forwards", "backwards"]
    assert parts.maps.shape == (2, 8, 8)
    assert parts.blocks == 4
    assert parts.maps.min() >= 0
    # the mean over directions and tokens is 1 in every block; dropping the class token moves it a little
    assert abs(float(parts.maps.mean()) - 1) < 0.1
    with torch.no_grad():  # a direction that is switched off contributes nothing
        for block in (silent := zoo.load("vim_micro.digits")).layers:
            block.mixer.scan.D[1] = 0
            block.mixer.scan.x_proj[1, -block.mixer.scan.state :] = 0  # C = 0
    off = scan_contributions(silent, x)
    assert float(off.maps[1].abs().max()) == 0
    assert float(off.maps[0].min()) > 0
    drawn = zoo.pipeline(model, contributions=True)(DIGITS / "digit_5.png")
    assert drawn.contributions is not None
    path = drawn.save_picture(tmp_path / "five.png")
    plain = pipe(DIGITS / "digit_5.png").picture()
    assert Image.open(path).size[1] > plain.size[1]
    with pytest.raises(ValueError, match="no scans along several directions"):
        scan_contributions(zoo.create("mambaout_femto", depths=[1, 1, 1, 1]), torch.zeros(1, 3, 64, 64))


def test_contributions_of_a_grid_scan_are_named_by_path():
    model = zoo.testing.case("vmamba_tiny_s1l8").build(depths=[1, 1, 1, 1]).eval()
    parts = scan_contributions(model, torch.randn(1, 3, 64, 64))
    assert len(parts.names) == 4
    assert parts.maps.shape[0] == 4
    assert parts.blocks >= 4


def test_embeddings(pipe):
    found = embed(pipe.model, DIGITS, batch_size=3)
    assert found.shape == (10, 64)
    assert found.dtype == np.float32
    x = torch.stack([pipe.prepare(pipe.read(f)) for f in sorted(DIGITS.glob("*.png"))])
    with torch.no_grad():
        expected = pipe.model.forward_head(pipe.model.forward_features(x), pre_logits=True)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_validate_matches_folders_by_label_or_order(pipe, tmp_path):
    model = pipe.model
    found = validate_folder(model, as_folders(tmp_path / "a"), batch_size=4, progress=False)
    assert (found.samples, found.metrics["top1"]) == (10, 1.0)
    assert found.metrics["top5"] == 1.0
    assert "by label" in found.notes
    names = [f"class_{9 - i}" for i in range(10)]  # sorted order is now the reverse of the digits
    found = validate_folder(model, as_folders(tmp_path / "b", names), progress=False)
    assert found.metrics["top1"] < 0.5
    assert "sorted order" in found.notes
    some = tmp_path / "c"
    as_folders(some)
    for digit in "0246":
        (some / digit / f"digit_{digit}.png").unlink()
        (some / digit).rmdir()
    found = validate_folder(model, some, limit=3, progress=False)
    assert (found.samples, found.metrics["top1"]) == (3, 1.0)
    (some / "cat").mkdir()
    with pytest.raises(zoo.errors.BadArgument, match="fit neither"):
        validate_folder(model, some, progress=False)
    with pytest.raises(zoo.errors.BadArgument, match="no subfolders"):
        validate_folder(model, some / "cat", progress=False)


# -- as typed ----------------------------------------------------------------------------------------------------------


def test_classify_command(tmp_path, capsys):
    drawing = ["--save-picture", str(tmp_path / "p"), "--contributions"]
    asked = ["classify", "vim_micro.digits", str(DIGITS / "digit_7.png"), "--top-k", "2", "--json"]
    assert run([*asked, "--csv", str(tmp_path / "a.csv"), *drawing]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["labels"][0] == "7"
    assert len(found[0]["labels"]) == 2
    assert Image.open(found[0]["picture"]).format == "PNG"
    assert (tmp_path / "a.csv").read_text().count("\n") == 2
    assert run(["classify", "vim_micro.digits", str(tmp_path / "none*.png")]) == 3
    assert "no file matches" in capsys.readouterr().err


def test_predict_command_uses_the_pipeline(capsys):
    assert run(["predict", "vim_micro.digits", str(DIGITS / "digit_2.png"), "-o", "top_k=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["answer"] == "2"


def test_embed_command(tmp_path, capsys):
    out = tmp_path / "e.npy"
    assert run(["embed-images", "vim_micro.digits", str(DIGITS), "--out", str(out)]) == 0
    assert np.load(out).shape == (10, 64)
    assert len(out.with_suffix(".txt").read_text().splitlines()) == 10
    assert "10 images, 64 features" in capsys.readouterr().out
    assert run(["embed-images", "vim_micro.digits", str(DIGITS), "--out", str(tmp_path / "e.csv")]) == 2
    assert "expected .npy, .parquet" in capsys.readouterr().err


def test_embeddings_as_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "e.parquet"
    assert run(["embed-images", "vim_micro.digits", str(DIGITS), "--out", str(out)]) == 0
    table = pyarrow.read_table(out)
    assert table.column_names == ["source", "embedding"]
    assert table.num_rows == 10


def test_validate_command(tmp_path, capsys):
    folder = as_folders(tmp_path / "v")
    assert run(["validate", "vim_micro.digits", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metrics"]["top1"], found["samples"]) == (1.0, 10)
    assert found["per_second"] > 0
    assert run(["validate", "vim_micro.digits", str(folder)]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_the_plugin_and_its_cards_need_no_torch():
    script = "import sys, zoo_vision.plugin as p; p.zoo_models(); p.zoo_demos(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)


def test_the_demo_checkpoint_is_small_and_what_its_card_says():
    """The recipe's own split, transforms and measure give the figures on the card."""
    pytest.importorskip("sklearn")
    import importlib.util

    path = ROOT / "plugins/vision/recipes/train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    model = zoo.load("vim_micro.digits")
    card = model.zoo_info.weights
    _, images, _, labels = recipe.split()
    assert len(images) == 450
    x = recipe.prepared(images, ImageClassification(model))
    measured = recipe.accuracy(model, x, torch.from_numpy(labels))
    assert measured >= 0.97
    assert round(100 * measured, 2) == card.metrics[0].value
    assert f"{100 * recipe.accuracy(model, -x, torch.from_numpy(labels)):.2f} %" in card.notes
    file = ROOT / "plugins/vision/src/zoo_vision" / card.package_file
    assert file.stat().st_size <= 1_000_000
