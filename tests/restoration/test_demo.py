"""The demo restorers: their cards' figures hold on other unseen drawings, and their sample files come out better."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import zoo
import zoo_restoration
from zoo.cli import zoo as command_line
from zoo_restoration.degradations import Degradation
from zoo_restoration.drawings import drawing
from zoo_restoration.images import read_picture
from zoo_restoration.training import measure
from zoo_restoration.validation import degradation_for, plain_for

DEMO = Path(zoo_restoration.__file__).parent / "demo"
DEMOS = {"serpent_micro.drawings": "noisy.png", "contrast_micro.drawings": "small.png"}


@pytest.mark.parametrize("name", DEMOS)
def test_the_figures_hold(name):
    model = zoo.load(name)
    task = degradation_for(model, None)
    metrics = {m.name: m.value for m in zoo.info(name).weights.metrics}
    unseen = [drawing(3_000_000 + i, 96) for i in range(20)]
    found, plain = measure(model, unseen, task), measure(plain_for(task), unseen, task)
    gain = metrics["PSNR (RGB, dB)"] - next(v for k, v in metrics.items() if k.startswith("PSNR of "))
    assert gain > 0.5
    assert found["psnr"] - plain["psnr"] == pytest.approx(gain, abs=0.4)
    assert found["ssim_y"] > plain["ssim_y"]


@pytest.mark.parametrize("name", DEMOS)
def test_the_sample_files(name):
    answer = zoo.pipeline(name)(DEMO / DEMOS[name])
    assert answer.tiles == 1
    clean = drawing(1_000_007, answer.height)
    spoilt = sample(DEMO / DEMOS[name])
    task = Degradation.parse(zoo.info(name).weights.preprocess["degradation"])
    plain = plain_for(task)(spoilt)
    wanted = torch.from_numpy(clean.copy()).permute(2, 0, 1)[None] / 255
    found = torch.from_numpy(answer.image.colours).permute(2, 0, 1)[None]
    assert float((found - wanted).square().mean()) < float((plain - wanted).square().mean())


def sample(path):
    return torch.from_numpy(read_picture(path).colours).permute(2, 0, 1)[None]


def test_zoo_demo_runs_both(tmp_path):
    result = CliRunner().invoke(
        command_line, ["demo", "--domain", "restoration", "--out", str(tmp_path)], standalone_mode=False
    )
    assert result.return_value == 0, result.output
    assert len(list(tmp_path.glob("*.png"))) == 2
