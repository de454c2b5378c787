"""The demo draws what it is asked for, and its card's figures hold on other seeds; the documentation runs."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from recipes import recipe

import zoo
import zoo_generation
from zoo.cli.predict import predict as predict_command

ROOT = Path(__file__).parents[2]
SAMPLE = Path(zoo_generation.__file__).parent / "demo" / "shapes.txt"
NAME = "dimsum_micro.shapes"


@pytest.fixture(scope="module")
def shapes():
    return recipe("generation", "drawn_shapes")


@pytest.fixture(scope="module")
def judge(shapes):
    return shapes.train_judge(*shapes.draw(12_000, 21), epochs=4)


def test_the_sample_file():
    answer = zoo.pipeline(NAME)(SAMPLE)
    assert answer.labels == SAMPLE.read_text(encoding="utf-8").split()
    assert answer.images.shape == (8, 16, 16)
    picture = np.asarray(answer.picture())
    assert picture.shape == ((3 * 18 - 2) * 6, (3 * 18 - 2) * 6)
    done = CliRunner().invoke(predict_command, [NAME, str(SAMPLE), "--json"], catch_exceptions=False)
    assert json.loads(done.output)[0]["labels"] == answer.labels


def test_samples_are_what_was_asked_for(shapes, judge):
    held_out = shapes.draw(400, 22)
    assert shapes.accuracy(judge, *held_out) > 0.95
    figure = next(m.value for m in zoo.info(NAME).weights.metrics if m.name == "accuracy")
    answer = zoo.pipeline(NAME, count=12, seed=1000)("all")
    images = torch.from_numpy(answer.images).float()[:, None] / 127.5 - 1
    wanted = torch.tensor([shapes.CLASSES.index(label) for label in answer.labels])
    assert shapes.accuracy(judge, images, wanted) == pytest.approx(figure, abs=0.08)
    assert images.std(0).mean() > 0.3  # not one image again and again


def test_guidance_changes_images():
    plain, guided = (zoo.pipeline(NAME, cfg=cfg, method="heun", steps=8)("ring, bars").images for cfg in (1.0, 3.0))
    assert np.abs(plain.astype(int) - guided).mean() > 2


def test_the_loss_is_lower_with_labels(shapes, tmp_path):
    images, labels = shapes.draw(64, 23)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / shapes.CLASSES[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(folder / f"{i}.png")
    found = zoo.validate(NAME, tmp_path).metrics
    assert found["loss"] < found["loss without labels"] < 1


def test_the_recipe_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--images", "64", "--steps", "2", "--dry-run", "--samples", "2"])
    recipe("generation", "train_shapes").main()
    said = capsys.readouterr().out
    assert '"pixel normals"' in said
    assert "'step': 2" in said


@pytest.mark.parametrize("page", ["docs/generation.md", "plugins/generation/README.md"])
def test_the_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    text = (ROOT / page).read_text(encoding="utf-8")
    about_dimsum = text[text.index("## DiMSUM") :].partition("\n## UniAnimate")[0]
    for code in re.findall(r"```python\n(.*?)```", about_dimsum, re.DOTALL):
        exec(code, names)
    assert Image.open(tmp_path / "shapes.png").width > 100
    assert len(names["answer"].labels) in (4, 8)
