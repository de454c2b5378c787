"""EEGDM's flags against outputs recorded with the original's code (jhpuah/EEGDM @ 976a5f4): every case of
``eegdm_flags.json`` has its arguments, a checksum of the original's keys and shapes, and the outputs for weights and
inputs computed from their names."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch

import zoo
from zoo.testing.procedural import procedural_values
from zoo_neuro.eegdm.backbone import DiffusionBackbone
from zoo_neuro.eegdm.fusion import EEGClassifier

RECORDED = json.loads((Path(__file__).parent / "eegdm_flags.json").read_text())


def _whole(case: dict) -> dict:
    """A case with the arguments that all share, which the file has once."""
    backbone = {**RECORDED["shared"]["wavenet"], **case["wavenet"]}
    if "classifier" not in case:
        return {**case, "config": backbone}
    config = {"wavenet": backbone, "classifier": {**RECORDED["shared"]["classifier"], **case["classifier"]}}
    return {**case, "config": config | {k: case[k] for k in ("fusion",) if k in case}}


CASES = [_whole(case) for case in RECORDED["cases"]]
ADAPTER = zoo.reference("eegdm")


def fill(key: str, shape: list[int]) -> list:
    """How the weights of a key are drawn: sizes at which every part of the model matters."""
    name = key.rpartition(".")[2]
    if ".kernel." in key:
        return {
            "inv_dt": ["u", 1, -2],
            "A_real": ["u", 0.2, -0.7],
            "A_imag": ["neg_arange", 0.4, 0],
            "P": ["u", 0.3, 0],
        }.get(name, ["u", 0.6, 0])
    if key.endswith("layer.D") or name == "original0" or (name == "weight" and len(shape) == 1):
        return ["u", 0.2, 1]
    if len(shape) == 1:
        return ["u", 0.1, 0]
    return ["u", 1.7 / math.sqrt(math.prod(shape[1:]) or 1), 0]


def filled(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {key: procedural_values(key, shape, fill(key, shape)) for key, shape in shapes.items()}


def inputs_of(case: dict) -> dict[str, torch.Tensor]:
    return {
        name: procedural_values(f"in/{name}", e["shape"], e.get("fill", ["u", 1.7, 0]))
        for name, e in case["inputs"].items()
    }


def checksum(shapes: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(sorted((k, list(s)) for k, s in shapes.items())).encode())


def shapes_of(config: dict) -> dict[str, list[int]]:
    """The parameters of our model under the original's keys."""
    build = EEGClassifier if "classifier" in config else DiffusionBackbone
    with torch.random.fork_rng(devices=[]):
        state = ADAPTER.to_reference(build(**ADAPTER.arguments(config)).state_dict())
    return {key: list(value.shape) for key, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_flags(case):
    shapes = shapes_of(case["config"])
    assert checksum(shapes) == case["keys"], "keys or shapes differ from the original's"
    model = ADAPTER.build(case["config"], filled(shapes), source=case["source"])
    with torch.no_grad():
        found = ADAPTER.run(model, inputs_of(case), call=case.get("call"))
    for name, values in case["outputs"].items():
        expected = torch.tensor(values)
        got = found[name].flatten()[:: case["every"]]
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


TWO = {"query": ["gate", "filter"], "reduce": ["std", "mean"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_ap_clst": 2}, "n_ap_clst"),
        (TWO, "letters c"),
        ({**TWO, "multi_query_merge": "cat", "stack_struct": "sccf"}, "'cat'"),
        ({"n_clst": 1, "clst_dim": ""}, "single token"),
        ({"have_ch_pos_embed": True, "ch_order": ["FP1-F7", "FZ-CZ", "T4-C4", "P4-O2"]}, "FZ-CZ"),
        ({"across_pool_stack_struct": "sc"}, "no c"),
        ({"window_size": 9}, "tile"),
        ({"depth_of_nothing": 1}, "depth_of_nothing"),
    ],
)  # fmt: skip
def test_what_the_original_cannot_run_is_refused(change, said):
    config = next(c["config"] for c in CASES if c["name"] == "classifier")
    with pytest.raises(ValueError, match=said):
        ADAPTER.build({**config, "classifier": {**config["classifier"], **change}}, {}, source="x:Classifier")
