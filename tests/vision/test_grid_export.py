"""Models that walk a grid by cached orders: ONNX gives the same answer, no tracer leaves its mark in a cache."""

import logging
import subprocess
import sys

import pytest
import torch

import zoo.testing
import zoo_kernels

NAMES = ["vmamba_tiny_s1l8", "a2mamba_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_gives_the_same_answer(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    case = zoo.testing.case(name)
    model, x = case.build(depths=[1, 1, 1, 1]).eval(), case.inputs(1)[""]
    with torch.no_grad():
        expected = model(x)
        with zoo_kernels.backend("export"):
            torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    zoo.testing.assert_close(torch.from_numpy(found), expected, tolerance=1e-4, what=f"{name} in onnxruntime")


def test_tracing_and_inference_first_then_training():
    """In a new process, where no order is cached yet."""
    script = """
import torch, zoo.testing
for name in ("vmamba_tiny_s1l8", "a2mamba_tiny"):
    case = zoo.testing.case(name)
    model, x = case.build(depths=[1, 1, 1, 1]).eval(), case.inputs(1)[""]
    program = torch.export.export(model, (x,), strict=False).module()
    with torch.inference_mode():
        y = model(x)
    torch.testing.assert_close(program(x), y, rtol=1e-4, atol=1e-5)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
