"""Models that walk a grid by cached orders: ONNX gives the same answer, no tracer leaves its mark in a cache."""

import subprocess
import sys

import pytest

import zoo
import zoo.testing

NAMES = ["vmamba_tiny_s1l8", "a2mamba_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_gives_the_same_answer(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = zoo.testing.case(name)
    made = zoo.export(case.build(depths=[1, 1, 1, 1]), tmp_path / "m.onnx", inputs=case.inputs(1), dynamic=())
    assert made.difference <= 1e-4


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
