"""The export forms, traced: torch's own operators, any number of steps, and what ONNX makes of them."""

import logging

import numpy as np
import pytest
import torch

import zoo_kernels as zk

STEPS = torch.export.Dim.AUTO
CHANNELS, STATE, HEADS = 6, 4, 2


def rows(batch, length, *sizes):
    return torch.randn(batch, length, *sizes)


def selective_scan(batch, length):
    A, D, bias = -torch.rand(2, CHANNELS, STATE), torch.randn(2, CHANNELS), torch.randn(2, CHANNELS)
    given = [rows(batch, length, CHANNELS), rows(batch, length, 2, CHANNELS)]
    given += [rows(batch, length, 2, 2, STATE), rows(batch, length, 2, 2, STATE), torch.rand(batch, length) < 0.2]

    def call(u, dt, B, C, resets):
        return zk.selective_scan(
            u, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, reverse=[False, True], resets=resets
        )

    return call, given


def selective_scan_with_lengths_and_state(batch, length):
    A = -torch.rand(CHANNELS, STATE)
    given = [rows(batch, length, CHANNELS), rows(batch, length, CHANNELS)]
    given += [rows(batch, length, STATE), rows(batch, length, STATE)]
    given += [torch.arange(1, batch + 1), torch.randn(batch, CHANNELS, STATE)]

    def call(u, dt, B, C, lengths, state):
        return zk.selective_scan(
            u, dt, A, B, C, dt_softplus=True, lengths=lengths, initial_state=state, return_final_state=True
        )

    return call, given


def ssd(batch, length):
    A = -torch.rand(HEADS)
    given = [rows(batch, length, HEADS, CHANNELS), torch.rand(batch, length, HEADS)]
    given += [rows(batch, length, 1, STATE), rows(batch, length, 1, STATE)]
    return lambda x, dt, B, C: zk.ssd(x, dt, A, B, C, return_final_state=True), given


def linear_scan(batch, length):
    given = [rows(batch, length, CHANNELS), torch.rand(batch, length, CHANNELS), torch.randn(batch, CHANNELS)]
    return lambda x, a, state: zk.linear_scan(x, a, initial_state=state, return_final_state=True), given


def mlstm(batch, length):
    given = [rows(batch, length, HEADS, CHANNELS) for _ in range(3)] + [rows(batch, length, HEADS) for _ in range(2)]
    return lambda q, k, v, i, f: zk.mlstm(q, k, v, i, f, return_final_state=True), given


def slstm(batch, length):
    R, b = torch.randn(HEADS, CHANNELS, 4, CHANNELS) / 4, torch.randn(HEADS, 4, CHANNELS)
    given = [rows(batch, length, 4, HEADS, CHANNELS), torch.rand(batch, length) < 0.2]
    return lambda gates, resets: zk.slstm(gates, R, b, resets=resets, return_final_state=True), given


def slstm_with_lengths(batch, length):
    R = torch.randn(HEADS, CHANNELS, 4, CHANNELS) / 4
    given = [rows(batch, length, 4, HEADS, CHANNELS), torch.arange(1, batch + 1)]
    return lambda gates, lengths: zk.slstm(gates, R, lengths=lengths, reverse=True), given


def gated_linear_attention(batch, length):
    given = [rows(batch, length, HEADS, STATE), rows(batch, length, HEADS, STATE), rows(batch, length, HEADS, CHANNELS)]
    given += [-torch.rand(batch, length, HEADS, STATE), torch.rand(batch, length) < 0.2]
    return lambda q, k, v, decay, resets: zk.linear_attention(q, k, v, decay, strict=True, resets=resets), given


def long_conv(batch, length):
    kernel = torch.randn(CHANNELS, 11)
    return lambda x: zk.long_conv(x, kernel), [rows(batch, length, CHANNELS)]


OPERATORS = [
    selective_scan,
    selective_scan_with_lengths_and_state,
    ssd,
    linear_scan,
    mlstm,
    slstm,
    slstm_with_lengths,
    gated_linear_attention,
    long_conv,
]


class Traced(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        found = torch.utils._pytree.tree_leaves(self.call(*inputs))
        return tuple(t for t in found if t is not None)


@pytest.mark.parametrize("make", OPERATORS, ids=lambda make: make.__name__)
def test_traced_form(make, tmp_path):
    """One trace of 7 steps serves 13 (but a convolution) in torch and onnxruntime, and holds none of our operators."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    torch.manual_seed(0)
    call, given = make(2, 7)
    torch.manual_seed(0)
    _, other = make(2, 13 if make is not long_conv else 7)
    shapes = tuple({1: STEPS} if make is not long_conv and t.dim() > 1 and t.shape[1] == 7 else None for t in given)
    module = Traced(call)
    with torch.no_grad():
        with zk.backend("export"):
            program = torch.export.export(module, tuple(given), dynamic_shapes=(shapes,), strict=False)
            onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        with zk.backend("reference"):
            expected = module(*other)
        found = program.module()(*other)
    assert not any("zoo_kernels" in str(node.target) for node in program.graph.nodes)
    # onnxruntime adds up rows of one index on several threads at once, and loses some of them now and then
    kinds = [node.attributes.get("reduction") for node in onnx.model.graph]
    assert all(kind is None or kind.as_string() == "none" for kind in kinds)
    onnx.save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    answers = session.run(None, {name: t.numpy() for name, t in zip(names, other, strict=True)})
    for one, run, wanted in zip(found, answers, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run, wanted.numpy(), rtol=1e-4, atol=1e-5)
