"""``zoo.load(..., device_map=...)``: sharded checkpoints over the CPU and the disk give the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo import placement
from zoo_language.generation import Sampling, generate
from zoo_language.mamba import MambaLM
from zoo_registry import errors

pytest.importorskip("accelerate")

KINDS = {
    "mamba": {"layer": "Mamba1"},
    "mamba2": {"layer": "Mamba2", "ssm": {"headdim": 16, "d_state": 16}, "tie_embeddings": False},
    "hybrid": {
        "layer": "Mamba2", "ssm": {"headdim": 16, "d_state": 16}, "attention_layers": (1,), "d_intermediate": 128,
        "attention": {"num_heads": 4},
    },
}  # fmt: skip
PROMPTS = [[5, 9, 2, 44, 8], [7, 1, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo model in several shards."""
    whole = zoo.load("mamba2_micro.bible")
    made = zoo.save(whole, tmp_path_factory.mktemp("shards") / "model", shard_bytes=500_000)
    assert len(list(Path(made).glob("*.safetensors"))) > 2
    return Path(made)


def answers(model) -> tuple:
    ids = torch.tensor([[72, 101, 32, 115, 97]])
    texts, state = generate(model, PROMPTS, max_new_tokens=9, sampling=Sampling(temperature=0.8, seed=3))
    with torch.no_grad():
        return model(ids), [t.tokens for t in texts], state.logits


def same(found, want) -> None:
    assert torch.equal(found[0], want[0])
    assert found[1] == want[1]
    assert torch.equal(found[2], want[2])


def layers(folder: Path) -> int:
    return len(zoo.load(folder).layers)


@pytest.mark.parametrize("where", ["some", "all", "auto"])
def test_shards_over_cpu_and_disk(folder: Path, tmp_path: Path, where: str) -> None:
    want = answers(zoo.load(folder))
    options: dict = {"offload_folder": tmp_path / "offload"}
    if where == "some":
        parts = {f"layers.{i}": "disk" if i % 2 else "cpu" for i in range(layers(folder))}
        options["device_map"] = {"embedding": "disk", **parts, "norm_f": "cpu"}
    elif where == "all":
        options["device_map"] = {"": "disk"}
    else:
        options |= {"device_map": "auto", "max_memory": {"cpu": "700KB"}}
    model = zoo.load(folder, **options)
    assert "disk" in model.hf_device_map.values()
    away = [name for name, p in model.named_parameters() if p.is_meta]
    assert away, "nothing was offloaded"
    assert list((tmp_path / "offload").glob("*.dat"))
    assert model.device == torch.device("cpu")
    same(answers(model), want)
    assert [name for name, p in model.named_parameters() if p.is_meta] == away  # put back after use


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_kind_from_the_disk(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MambaLM(d_model=32, n_layer=3, vocab_size=256, **KINDS[kind]).eval()
    want = answers(model)
    placed = placement.place(model, {"": "disk"}, offload_folder=tmp_path)
    assert all(p.is_meta for p in placed.parameters())
    same(answers(placed), want)


def test_dtype_and_a_folder_of_its_own(folder: Path) -> None:
    want = answers(zoo.load(folder, dtype="bfloat16"))
    model = zoo.load(folder, dtype="bfloat16", device_map={"embedding": "cpu", "layers": "disk", "norm_f": "cpu"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    same(answers(model), want)


def test_without_a_limit_auto_is_an_ordinary_model(folder: Path) -> None:
    model = zoo.load(folder, device_map="auto")
    if not torch.cuda.is_available():
        assert set(model.hf_device_map.values()) == {"cpu"}
    assert not any(p.is_meta for p in model.parameters())


def test_units_are_blocks() -> None:
    assert placement.units(MambaLM(d_model=32, n_layer=2, vocab_size=64)) == ["Block"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "device_map is 'everywhere'; expected 'auto', "),
        ({"device_map": {"layer": "cpu"}}, "device_map names layer, which MambaLM does not have; its parts are "),
        ({"device_map": {"layers": "cpu"}}, "device_map does not cover the model: .*embedding"),
        ({"device_map": "auto", "device": "cpu"}, "both device='cpu' and device_map='auto' were given"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "max_memory limits the plans"),
        ({"max_memory": {"cpu": 1}}, "belong to device_map, which was not given"),
    ],
)
def test_wrong_maps_are_explained(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(errors.BadArgument, match=message):
        zoo.load(folder, **options)


def test_without_accelerate_the_extra_is_named(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'ssm-zoo\[accelerate\]'"):
        zoo.load(folder, device_map="auto")


def test_the_command_line_spreads_too(caplog) -> None:
    from click.testing import CliRunner

    from zoo_language.commands import generate as command

    words = ["mamba2_micro.bible", "And God said", "--max-new-tokens", "5", "--json"]
    plain = CliRunner().invoke(command, words)
    placed = CliRunner().invoke(command, [*words, "--device-map", "auto", "--cuda-graphs"])
    assert plain.exit_code == placed.exit_code == 0, placed.output
    assert '"text"' in plain.stdout
    assert placed.stdout.partition('"seconds"')[0] == plain.stdout.partition('"seconds"')[0]
    if not torch.cuda.is_available():
        assert "CUDA graphs were asked for, but the model is on cpu" in caplog.text
