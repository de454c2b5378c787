"""Outputs, intermediates and gradients of the originals. Published sizes are checked in tests/fullsize."""

from pathlib import Path

import pytest
import torch

import zoo
import zoo.testing
from zoo.reference import read_golden

ROOT = Path(__file__).parents[1]
SYSTEMS = ("umamba", "vm_unet", "segmamba", "swin_umamba", "mambamim")
GOLDEN = sorted(p for s in SYSTEMS for p in (ROOT / "golden").glob(f"{s}__*.safetensors*"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_golden(path):
    zoo.testing.check_golden(path, grad=True, grad_tolerance=1e-4)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name.split(".")[0])
def test_the_originals_file_is_written_again(path):
    golden = read_golden(path)
    adapter = zoo.reference(golden.system)
    again = adapter.to_reference(adapter.build(golden.config, golden.state, source=golden.source).state_dict())
    expected = {k: v for k, v in golden.state.items() if not k.endswith("num_batches_tracked")}
    again = {k: v for k, v in again.items() if not k.endswith("num_batches_tracked")}
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor), key


def test_a_changed_copy_is_refused():
    golden = read_golden(ROOT / "golden" / "umamba__bot_2d.safetensors")
    state = dict(golden.state)
    state["decoder.encoder.stem.0.conv1.weight"] = state["decoder.encoder.stem.0.conv1.weight"] + 1
    with pytest.raises(ValueError, match="differs from"):
        zoo.reference("umamba").build(golden.config, state)


def test_an_unknown_argument_is_named():
    golden = read_golden(ROOT / "golden" / "segmamba__brats_like.safetensors")
    with pytest.raises(ValueError, match="no argument 'nothing'"):
        zoo.reference("segmamba").build({**golden.config, "nothing": 1}, golden.state)
