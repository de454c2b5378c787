"""Captures to the bytes that a masked autoencoder rebuilds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
import zoo.testing
from zoo import errors
from zoo.cli import run
from zoo_network.captures import read_capture
from zoo_network.flows import FlowBytes, split_flows, to_tensor

from .packet_writer import ethernet, ipv4, ipv6, pcap, tcp, udp

BYTES = {"packets": 4, "header_bytes": 16, "payload_bytes": 16}  # of the tiny model


@pytest.fixture(scope="module")
def model():
    return zoo.testing.case("netmamba_pretrain").build().eval()


@pytest.fixture
def capture(tmp_path):
    frames = []
    for i in range(9):
        body = bytes((7 * i + j) % 256 for j in range(40))
        packet = ipv4(udp(body, 4000 + i % 3), 17) if i % 2 else ipv4(tcp(body, 5000), 6)
        frames.append((float(i), ethernet(packet)))
    (tmp_path / "a.pcap").write_bytes(pcap(frames))
    return tmp_path / "a.pcap"


def test_the_answer_is_the_models(model, capture):
    pipe = zoo.pipeline(model, mask_ratio=0.75, seed=3, **BYTES)
    answer = pipe(capture)
    flows = split_flows(read_capture(capture).packets)
    assert [(f.source_port, f.packets) for f in answer.flows] == [(f.endpoints.source_port, f.packets) for f in flows]
    given = torch.stack([to_tensor(FlowBytes(**BYTES)(flow.kept)) for flow in flows])
    noise = torch.rand(len(flows), 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model(given, 0.75, noise)
    assert answer.loss == pytest.approx(found["loss"].item(), rel=1e-5)
    for i, flow in enumerate(answer.flows):
        hidden = found["mask"][i].bool().repeat_interleave(4).numpy()
        np.testing.assert_array_equal(flow.hidden, hidden)
        np.testing.assert_array_equal(flow.bytes, FlowBytes(**BYTES)(flows[i].kept))
        np.testing.assert_array_equal(flow.rebuilt[~hidden], flow.bytes[~hidden])
        expected = ((found["pred"][i].flatten() / 2 + 0.5) * 255).clamp(0, 255).numpy()[hidden]
        assert np.abs(flow.rebuilt[hidden] - expected).max() <= 0.51
        off = np.abs(flow.rebuilt[hidden].astype(float) - flow.bytes[hidden]).mean()
        assert flow.byte_error == pytest.approx(off, rel=1e-5)


def test_the_seed_decides(model, capture):
    pipe = zoo.pipeline(model, **BYTES)
    first = pipe(capture)
    assert first.to_dict()["flows"] == pipe([capture, capture], batch_size=2)[1].to_dict()["flows"]
    small = zoo.pipeline(model, flows_per_batch=1, **BYTES)(capture)
    assert small.loss == pytest.approx(first.loss, rel=1e-5)
    other = zoo.pipeline(model, seed=1, **BYTES)(capture)
    assert not np.array_equal(other.flows[0].hidden, first.flows[0].hidden)
    assert first.mask_ratio == 0.9
    assert first.flows[0].hidden.sum() == 128 - 4 * 3


def test_targets_that_are_normalised_come_back_as_bytes(capture):
    """A perfect prediction of normalised strides rebuilds the flow to the byte."""
    model = zoo.testing.case("netmamba_pretrain").build(norm_pix_loss=True).eval()
    pipe = zoo.pipeline(model, **BYTES)
    sample = pipe.read(capture)
    strides = pipe.rows(sample).view(-1, 32, 4)
    right = (strides - strides.mean(-1, keepdim=True)) / (strides.var(-1, keepdim=True) + 1e-6).sqrt()
    answer = pipe.finish({"pred": right, "mask": torch.ones(len(strides), 32)}, sample)
    assert answer.loss == pytest.approx(0, abs=1e-9)
    assert answer.byte_error == 0
    assert all(flow.hidden.all() for flow in answer.flows)


def test_files(model, capture, tmp_path):
    answer = zoo.pipeline(model, **BYTES)(capture)
    held = np.load(answer.save(tmp_path / "out" / "a.npz"))
    assert held["rebuilt"].shape == held["hidden"].shape == (len(answer.flows), 128)
    np.testing.assert_array_equal(held["bytes"][1], answer.flows[1].bytes)
    with pytest.raises(ValueError, match=r"written as .npz"):
        answer.save(tmp_path / "a.bin")
    answer.save_picture(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    hidden = sum(int(flow.hidden.sum()) for flow in answer.flows)
    assert (pixels == (70, 110, 190)).all(axis=-1).sum() == hidden * 9


def test_what_is_left_out_is_said(model):
    pipe = zoo.pipeline(model, **BYTES)
    answer = pipe(pcap([(0, ethernet(ipv6(udp(b"x"), 17), 0x86DD))]))
    assert answer.flows == []
    assert answer.loss is None
    assert answer.notes == ["1 flows of IPv6 have no bytes to rebuild: the model was trained on the bytes of IPv4"]
    assert "no flows of IPv4" in str(answer)
    assert answer.picture().size[0] > 100


def test_mistakes(model):
    for ratio in (0, 1, 0.99):
        with pytest.raises(errors.BadArgument, match=rf"mask_ratio is {ratio}; expected .* 32 strides"):
            zoo.pipeline(model, mask_ratio=ratio, **BYTES)
    with pytest.raises(ValueError, match="the model reads 128"):
        zoo.pipeline(model)
    with pytest.raises(errors.BadArgument, match="rebuilds nothing"):
        zoo.pipeline(zoo.testing.case("netmamba_classifier").build(), task="traffic-pretraining")


def test_the_command_line(model, capture, tmp_path, capsys):
    zoo.save(model, tmp_path / "mine")
    options = [word for k, v in {**BYTES, "mask_ratio": 0.5, "seed": 7}.items() for word in ("-o", f"{k}={v}")]
    words = ["predict", str(tmp_path / "mine"), str(capture), "--pictures", str(tmp_path / "out"), "--json", *options]
    assert run(words) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(zoo.pipeline(model, mask_ratio=0.5, seed=7, **BYTES)(capture).loss, rel=1e-5)
    assert said["flows"][0]["protocol"] == "TCP"
    assert Image.open(said["picture"]).size[0] > 100
