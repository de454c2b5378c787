"""docs/vision.md: its Python runs, and its commands on the bundled checkpoints do."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/vision.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    for folder in ("digits", "objects", "scenes"):
        shutil.copytree(ROOT / "examples" / folder, tmp_path / "examples" / folder)
    for file in (tmp_path / "examples/digits").glob("*.png"):  # pictures of one's own: two classes
        own = tmp_path / "pictures" / ("even" if int(file.stem[-1]) % 2 == 0 else "odd") / file.name
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own)
    for i, file in enumerate(sorted((tmp_path / "examples/scenes").glob("*.jpg"))):  # and with label maps
        for kind in ("images", "labels"):
            (tmp_path / "fields" / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "fields/images" / file.name)
        labels = np.indices(Image.open(file).size[::-1])[i % 2] // 24
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "fields/labels" / f"{file.stem}.png")
    entries, objects = [], []
    for i, file in enumerate(sorted((tmp_path / "examples/objects").glob("*.jpg"))):  # and with boxes
        (tmp_path / "shelf").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "shelf" / file.name)
        entries.append({"id": i, "file_name": file.name})
        box = [20, 20, 40, 30]
        polygon = [20, 20, 60, 20, 60, 50, 20, 50]
        objects.append({"image_id": i, "category_id": i % 2, "bbox": box, "segmentation": [polygon]})
    table = {
        "images": entries,
        "annotations": objects,
        "categories": [{"id": i, "name": f"kind {i}"} for i in range(2)],
    }
    (tmp_path / "shelf" / "instances.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", range(PAGE.count("```python\n")))
def test_snippets_run(index: int, checkout: Path) -> None:
    snippet = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[index]
    if "onnx" in snippet:
        pytest.importorskip("onnxscript")
    exec(compile(snippet, "vision.md", "exec"), {})
    if "onnx" in snippet:
        assert (checkout / "digits.onnx").exists()


def test_training_on_pictures_of_ones_own_runs(checkout: Path) -> None:
    """One command after the other: the later ones take what the first saved."""
    pytest.importorskip("pycocotools")
    commands = [c for c in COMMANDS if "zoo train-" in c or "./my_" in c]
    assert len(commands) >= 9
    for command in commands:
        assert run(shlex.split(command)[1:]) == 0, command


@pytest.mark.parametrize("command", [c for c in COMMANDS if "_micro" in c and "zoo train-" not in c])
def test_commands_run(command: str, checkout: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "zoo"
    assert run(words[1:]) == 0
    for name in ("answers.csv", "digits.npy"):
        assert name not in command or (checkout / name).exists()
    assert "--save-picture" not in command or list((checkout / "drawn").glob("*.png"))
