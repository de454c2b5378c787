"""``zoo.export`` and ``zoo export``: what is written, what is said about it, and that nothing half-written stays."""

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import zoo
import zoo.testing
import zoo_kernels
from zoo.exporting import Exported
from zoo_kernels.runtime import forced_backend
from zoo_registry import query

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
errors = zoo.errors


class Net(nn.Module):
    """A model that the zoo did not build."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).softmax(-1)


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def metadata(path) -> dict:
    return {one.key: one.value for one in onnx.load(path).metadata_props}


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what is written -------------------------------------------------------------------------------------------------


def test_onnx_of_a_module_of_ones_own(tmp_path):
    model, x = Net(), torch.randn(2, 4)
    made = zoo.export(model, tmp_path / "net.onnx", inputs=x)
    assert isinstance(made, Exported)
    assert files(tmp_path) == ["net.onnx"]
    assert made.size == (tmp_path / "net.onnx").stat().st_size
    assert (made.format, made.dynamic, made.notes) == ("onnx", ("batch",), ())
    assert [str(port) for port in made.inputs] == ["x float32 (batch, 4)"]
    assert [str(port) for port in made.outputs] == ["output float32 (batch, 3)"]
    assert 0 <= made.difference <= 1e-4
    runner = session(tmp_path / "net.onnx")
    assert runner.get_inputs()[0].shape == ["batch", 4]
    for batch in (1, 2, 7):
        x = torch.randn(batch, 4)
        np.testing.assert_allclose(runner.run(["output"], {"x": x.numpy()})[0], model(x).detach().numpy(), atol=1e-6)
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 20
    assert json.loads(json.dumps(made.to_dict()))["inputs"][0] == {
        "name": "x",
        "shape": ["batch", 4],
        "dtype": "float32",
    }
    assert "any size  batch" in str(made)


def test_sizes_are_fixed_on_request_and_another_opset(tmp_path):
    made = zoo.export(Net(), tmp_path / "net.onnx", inputs=torch.randn(1, 4), dynamic=(), opset=18)
    assert made.dynamic == ()
    assert made.notes == ("batch is fixed at 1",)
    assert session(tmp_path / "net.onnx").get_inputs()[0].shape == [1, 4]
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 18


def test_a_batch_of_one_is_no_obstacle(tmp_path):
    made = zoo.export(Net(), tmp_path / "net.pt2", inputs=torch.randn(1, 4), dynamic=["batch"])
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert made.dynamic == ("batch",)
    assert program(torch.randn(5, 4)).shape == (5, 3)


class Several(nn.Module):
    """Named inputs, one without a batch, and a nest of outputs."""

    @dataclass
    class Output:
        logits: torch.Tensor
        nothing: None
        pair: tuple[torch.Tensor, dict[str, torch.Tensor]]

    def forward(self, left, right, ids):
        total = left + right
        return self.Output(total, None, (total.argmax(-1), {"rows": left[:, ids]}))


def test_nested_outputs_have_stable_names(tmp_path):
    model = Several()
    inputs = {"left": torch.randn(2, 5), "right": torch.randn(2, 5), "ids": torch.tensor([0, 3])}
    made = zoo.export(model, tmp_path / "m.onnx", inputs=inputs, dynamic=())
    assert [port.name for port in made.outputs] == ["logits", "pair.0", "pair.1.rows"]
    assert [port.dtype for port in made.outputs] == ["float32", "int64", "float32"]
    found = session(tmp_path / "m.onnx").run(["pair.1.rows"], {k: v.numpy() for k, v in inputs.items()})[0]
    np.testing.assert_array_equal(found, inputs["left"][:, [0, 3]].numpy())
    zoo.export(model, tmp_path / "m.pt2", inputs=inputs, dynamic=())
    answer = torch.export.load(tmp_path / "m.pt2").module()(**inputs)
    assert list(answer) == ["logits", "pair.0", "pair.1.rows"]


class Together(nn.Module):
    def forward(self, items, count):
        return items[torch.arange(items.shape[0]), count - 1]


class Same(nn.Module):
    def forward(self, x):
        return {"x": x + 1}


def test_an_output_with_the_name_of_an_input(tmp_path):
    made = zoo.export(Same(), tmp_path / "m.onnx", inputs=torch.zeros(2, 3))
    assert [port.name for port in made.outputs] == ["output.x"]
    assert session(tmp_path / "m.onnx").run(["output.x"], {"x": np.zeros((1, 3), np.float32)})[0].tolist() == [[1] * 3]


def test_inputs_by_name_share_a_batch(tmp_path):
    """What torch asserts about two of them is by names that a loaded program has."""
    inputs = {"items": torch.randn(2, 5), "count": torch.tensor([3, 5])}
    made = zoo.export(Together(), tmp_path / "m.pt2", inputs=inputs, dynamic=["batch"])
    assert made.dynamic == ("batch",)
    program = torch.export.load(tmp_path / "m.pt2").module()
    items = torch.randn(4, 5)
    torch.testing.assert_close(program(items=items, count=torch.tensor([1, 2, 3, 4])), items.diagonal()[:4])
    with pytest.raises((AssertionError, RuntimeError)):
        program(items=items, count=torch.tensor([1, 2]))


def test_a_sequence_of_any_length_and_batch(tmp_path):
    case = zoo.testing.case("mamba_130m")
    model = case.build()
    made = zoo.export(model, tmp_path / "mamba.onnx", inputs=case.inputs(2))
    assert made.dynamic == ("batch", "length")
    assert made.outputs[0].shape[:2] == ("batch", "length")
    runner = session(tmp_path / "mamba.onnx")
    for batch, length in ((1, 1), (3, 50)):
        ids = torch.randint(0, 50, (batch, length))
        with torch.no_grad():
            expected = model.eval()(ids)
        found = torch.from_numpy(runner.run(None, {"input_ids": ids.numpy()})[0])
        zoo.testing.assert_close(found, expected, tolerance=1e-4)


# -- what the file says ----------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_page_runs_and_the_digits_model_answers_the_same(tmp_path, monkeypatch):
    """The snippets of docs/export.md write it in both formats; every picture of the examples has the same class."""
    shutil.copytree(ROOT / "examples" / "digits", tmp_path / "examples" / "digits")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(snippet, "export.md", "exec"), names)
    pipe, said = names["pipe"], metadata("digits.onnx")
    labels = json.loads(said["zoo.labels"])
    assert said["zoo.model"] == "vim_micro.digits"
    assert said["zoo.zoo_version"] == zoo.__version__
    assert said["zoo.licence"] == pipe.info.weights.licence
    assert labels == pipe.labels()
    assert json.loads(said["zoo.preprocess"]) == pipe.preprocess
    pictures = sorted((ROOT / "examples" / "digits").glob("*.png"))
    assert len(pictures) > 2
    ready = torch.stack([pipe.prepare(pipe.read(path)) for path in pictures])
    classes = session("digits.onnx").run(["output"], {names["made"].inputs[0].name: ready.numpy()})[0].argmax(-1)
    assert [labels[i] for i in classes] == [answer.label for answer in pipe([str(p) for p in pictures])]
    assert names["program"](ready).argmax(-1).tolist() == classes.tolist()


def test_the_page_has_every_system():
    rows = re.findall(r"^\| `(\w+)` \| `\w+` \|", PAGE, re.MULTILINE)
    assert rows == sorted({entry.card.system for entry in query("*")})


def test_labels_and_licence_of_a_saved_folder(tmp_path, toys):
    model = zoo.create("toy_small", num_classes=2)
    zoo.save(model, tmp_path / "saved", labels=["cat", "dog"], licence="mit")
    made = zoo.export(tmp_path / "saved", tmp_path / "toy.pt2")
    assert made.facts["labels"] == ["cat", "dog"]
    assert made.facts["licence"] == "mit"
    extra = {"zoo.json": ""}
    torch.export.load(tmp_path / "toy.pt2", extra_files=extra)
    assert json.loads(extra["zoo.json"]) == made.facts


def test_a_new_head_has_no_names_of_classes(tmp_path, toys):
    made = zoo.export(zoo.load("toy_small.packed", num_classes=7), tmp_path / "toy.pt2")
    assert "labels" not in made.facts
    assert made.facts["preprocess"] == {"scale": 2.0}


def test_a_plain_program_runs_where_there_is_no_zoo(tmp_path):
    case = zoo.testing.case("vim_tiny_patch16_224")
    model, x = case.build(depth=1), case.inputs(2)[""]
    zoo.export(model, tmp_path / "vim.pt2", inputs=x, dynamic=())
    torch.save((x, model.eval()(x)), tmp_path / "pair.pt")
    script = """
import sys, torch
program = torch.export.load("vim.pt2").module()
x, expected = torch.load("pair.pt")
torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
assert not any(name == "zoo" or name.startswith("zoo_") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_program_that_keeps_the_kernels(tmp_path):
    case = zoo.testing.case("vim_tiny_patch16_224")
    model, x = case.build(depth=1), case.inputs(2)[""]
    zoo.export(model, tmp_path / "vim.pt2", inputs=x, operators="kernels")
    program = torch.export.load(tmp_path / "vim.pt2")
    assert any("zoo_kernels.selective_scan" in str(node.target) for node in program.graph.nodes)


# -- what is refused, and what is left -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("net.pt", {}, "ends in '.pt'; expected .onnx"),
        ("net", {}, "ends in ''; expected .onnx"),
        ("net.bin", {"format": "tflite"}, "format is 'tflite'; expected 'onnx' or 'pt2'"),
        ("net.onnx", {"operators": "kernels"}, "operators is 'kernels', which ONNX does not have"),
        ("net.onnx", {"opset": 11}, "opset is 11; expected an ONNX operator set, 18 or later"),
        ("net.pt2", {"opset": 18}, "opset is 18; expected"),
        ("net.pt2", {"tolerance": -1}, "tolerance is -1"),
        ("net.pt2", {"dynamic": ["height"]}, "dynamic has 'height'; Net has batch"),
        ("net.pt2", {"inputs": [[1.0]]}, "inputs has list for x; expected a tensor"),
        ("net.pt2", {"inputs": None}, "Net has no card that describes its inputs; give an example"),
    ],
)
def test_wrong_arguments(path, options, said, tmp_path):
    with pytest.raises(errors.BadArgument, match=said.replace("(", r"\(")):
        zoo.export(Net(), tmp_path / path, **{"inputs": torch.randn(2, 4), **options})
    assert files(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "net.pt2", tmp_path / "net.pt2"):
        (tmp_path / "net.pt2").mkdir(exist_ok=True)
        with pytest.raises(errors.StoreError, match="cannot be written"):
            zoo.export(Net(), path, inputs=torch.randn(2, 4))
    assert files(tmp_path) == ["file", "net.pt2"]
    assert files(tmp_path / "net.pt2") == []


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Unknown(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.T)


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        (Branches(), "m.pt2", "Branches cannot be traced by torch.export"),
        (Noise(), "m.pt2", "Noise draws random numbers in its forward pass"),
        (Unknown(), "m.onnx", "Unknown cannot be written as ONNX: ONNX has no form of aten"),
    ],
)
def test_models_that_cannot(model, path, said, tmp_path):
    (tmp_path / path).write_bytes(b"an older file")
    with pytest.raises(errors.NotExportable, match=said):
        zoo.export(model, tmp_path / path, inputs=torch.randn(3, 3))
    assert files(tmp_path) == [path]
    assert (tmp_path / path).read_bytes() == b"an older file"


def test_a_model_says_why_it_cannot(tmp_path):
    model = Net()
    model.not_exportable = "it reads the news"
    with pytest.raises(errors.NotExportable, match="Net cannot be exported: it reads the news"):
        zoo.export(model, tmp_path / "m.pt2", inputs=torch.randn(2, 4))


class OnlyTwo(nn.Module):
    """Its answer depends on the size in a way that a tracer does not see."""

    def forward(self, x):
        return x * int(x.shape[0])


def test_a_size_that_the_computation_fixes(tmp_path):
    made = zoo.export(OnlyTwo(), tmp_path / "m.pt2", inputs=torch.randn(2, 4))
    assert made.dynamic == ()
    assert any(note.startswith("batch is fixed at 2") for note in made.notes)
    with pytest.raises(errors.NotExportable, match="batch cannot differ from run to run: the computation of OnlyTwo"):
        zoo.export(OnlyTwo(), tmp_path / "n.pt2", inputs=torch.randn(2, 4), dynamic=["batch"])
    assert files(tmp_path) == ["m.pt2"]


class AnswersOtherwise(nn.Module):
    """Under a tracer it computes something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        y = self.layer(x)
        return 2 * y if torch.compiler.is_compiling() else y


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_that_answers_differently_is_not_kept(ending, tmp_path):
    with pytest.raises(errors.NotExportable, match=r"output by 1 of its largest value, allowed 0.0001") as caught:
        zoo.export(AnswersOtherwise(), tmp_path / f"m.{ending}", inputs=torch.randn(2, 64), dynamic=())
    assert caught.value.difference == pytest.approx(1)
    assert files(tmp_path) == []


def test_weights_beside_the_file_come_and_go_with_it(tmp_path, monkeypatch):
    """As above 2 GB: where torch writes a second file, both appear, and neither where the comparison fails."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 100)
    with pytest.raises(errors.NotExportable, match="answers differently"):
        zoo.export(AnswersOtherwise(), tmp_path / "m.onnx", inputs=torch.randn(2, 64), dynamic=())
    assert files(tmp_path) == []
    model = nn.Linear(64, 64)
    made = zoo.export(model, tmp_path / "m.onnx", inputs=torch.randn(2, 64))
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert made.size == sum(p.stat().st_size for p in tmp_path.iterdir()) > 64 * 64 * 4
    x = torch.randn(3, 64)
    found = session(tmp_path / "m.onnx").run(None, {made.inputs[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_the_callers_settings_stay(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4).eval())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    level = logging.getLogger("onnxscript").level
    with zoo_kernels.backend("reference"):
        zoo.export(model, tmp_path / "m.onnx", inputs=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
        assert forced_backend() == "reference"
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.getLogger("onnxscript").level == level
    assert torch.is_grad_enabled()


def test_bfloat16_and_other_devices(tmp_path):
    with pytest.raises(errors.BadArgument, match=r"bfloat16.*model.float\(\)"):
        zoo.export(Net().bfloat16(), tmp_path / "m.onnx", inputs=torch.randn(2, 4))
    with pytest.raises(errors.BadArgument, match="the model is on meta; expected the CPU"):
        zoo.export(Net().to("meta"), tmp_path / "m.pt2", inputs=torch.randn(2, 4))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(errors.MissingExtra, match=r"writing ONNX needs onnxscript: pip install 'ssm-zoo\[onnx\]'"):
        zoo.export(Net(), tmp_path / "m.onnx", inputs=torch.randn(2, 4))


# -- the command -----------------------------------------------------------------------------------------------------


def test_command(cli, tmp_path):
    code, out, err = cli("export", "toy_small.packed", "toy.onnx", "--json", "--size", "8x10")
    assert code == 0, err
    made = json.loads(out)
    assert made["inputs"][0]["shape"] == ["batch", 3, 8, 10]
    assert made["facts"]["labels"] == zoo.pipeline("toy_small.packed").labels()
    code, out, err = cli("export", "toy_small.packed", "toy.pt2", "--fixed", "--batch-size", "1")
    assert code == 0, err
    assert "none: every size is fixed" in out
    assert files(tmp_path) == ["toy.onnx", "toy.pt2"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("toy_small.packed", "toy.txt"), 2, "ends in '.txt'"),
        (("toy_smal", "toy.pt2"), 2, "toy_small"),
        (("toy_small.packed", "toy.pt2", "--fixed", "--dynamic", "batch"), 2, "expected one of them"),
        (("toy_small.packed", "toy.pt2", "--size", "8by8"), 2, "--size is '8by8'; expected sides as 384x384"),
        (("toy_small.packed", "toy.pt2", "--size", "8x8x8"), 2, "size has 3 sides; toy_small takes 2"),
        (("toy_small.packed", "toy.pt2", "--length", "7"), 2, "length is given, and toy_small takes no sequences"),
        (("toy_small.packed", "toy.pt2", "--dynamic", "length"), 2, "dynamic has 'length'; toy_small.packed has batch"),
    ],
)
def test_command_says_what_is_wrong(cli, words, code, said, tmp_path):
    found = cli("export", *words)
    assert found[0] == code, found
    assert said in found[2]
    assert files(tmp_path) == []


def test_rows_that_are_added_up_are_told(tmp_path):
    class Sums(nn.Module):
        def forward(self, x):
            return x.new_zeros(3, x.shape[1]).index_add(0, torch.tensor([0, 2, 2, 0]), x)

    made = zoo.export(Sums(), tmp_path / "m.onnx", inputs=torch.randn(4, 5), dynamic=())
    assert any("intra_op_num_threads=1" in note for note in made.notes)
