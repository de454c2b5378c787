"""The demo classifier answers from a capture, on the command line too, and its card's figures hold."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from recipes import recipe

import zoo
import zoo_network
from zoo.cli.predict import predict as predict_command
from zoo_network.captures import read_capture
from zoo_network.commands import classify_flows, pretrain_flows, train_flows
from zoo_network.data import files_in, label_set, read_folder, read_splits, representation_for
from zoo_network.flows import FlowBytes, split_flows

from .packet_writer import ethernet, ipv4, ipv6, pcap, udp

SAMPLE = Path(zoo_network.__file__).parent / "demo" / "sample.pcap"
MODEL = "netmamba_micro.generated"


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(MODEL)


@pytest.fixture(scope="module")
def traffic():
    return recipe("network", "traffic")


def test_sample(pipe):
    answer = pipe(SAMPLE)
    flows = split_flows(read_capture(SAMPLE).packets)
    assert len(answer.flows) == len(flows)
    assert [f.packets for f in answer.flows] == [f.packets for f in flows]
    assert all(0 < f.confidence <= 1 and f.label == next(iter(f.shares)) for f in answer.flows)
    assert {f.label for f in answer.flows} == set(label_set(SAMPLE.parent / "generated_classes.txt"))
    assert not answer.notes


def test_flows_are_answered_alone_as_together(pipe):
    packets = read_capture(SAMPLE).packets
    whole = pipe(SAMPLE)
    representation = FlowBytes()
    for flow, answer in list(zip(split_flows(packets), whole.flows, strict=True))[:4]:
        one = pipe(pcap([(p.time, p.data) for p in flow.kept]))
        assert one.flows[0].label == answer.label
        assert one.flows[0].confidence == pytest.approx(answer.confidence, abs=1e-5)
        assert representation(flow.kept).any()


def test_what_has_no_class_is_said(pipe):
    answer = pipe(pcap([(0, ethernet(bytes(28), 0x0806)), (1, ethernet(ipv6(udp(b"x"), 17), 0x86DD))]))
    assert [(f.label, f.confidence, f.source) for f in answer.flows] == [("", None, "::1")]
    assert answer.notes == [
        "1 packets without IP belong to no flow",
        "1 flows of IPv6 have no class: the model was trained on the bytes of IPv4",
    ]
    assert pipe(pcap([])).flows == []


def test_predict_and_csv(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    out = tmp_path / "flows.csv"
    run = CliRunner().invoke(classify_flows, [MODEL, str(SAMPLE), "--out", str(out)], catch_exceptions=False)
    assert run.exit_code == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == len(said["flows"])
    for row, flow in zip(rows, said["flows"], strict=True):
        assert row["label"] == flow["label"]
        assert float(row["confidence"]) == pytest.approx(flow["confidence"], abs=1e-5)
        assert int(row["source_port"]) == flow["source_port"]


def test_options(pipe, tmp_path):
    both = zoo.pipeline(MODEL, bidirectional=True, top_k=1)(SAMPLE)
    assert len(both.flows) < len(pipe(SAMPLE).flows)
    assert all(len(f.shares) == 1 for f in both.flows)
    names = list("abcdefgh")
    assert {f.label for f in zoo.pipeline(MODEL, labels=names)(SAMPLE).flows} <= set(names)
    with pytest.raises(ValueError, match="there are 7 labels, and the model has 8 classes"):
        zoo.pipeline(MODEL, labels="iscxvpn2016")
    with pytest.raises(ValueError, match="labels is 'nothing'; expected one of ciciot2022"):
        zoo.pipeline(MODEL, labels="nothing")
    with pytest.raises(ValueError, match="are 640, but the model reads 1600"):
        zoo.pipeline(MODEL, packets=2)
    with pytest.raises(ValueError, match="top_k is 0"):
        zoo.pipeline(MODEL, top_k=0)
    (tmp_path / "x.pcap").write_bytes(b"not a capture")
    with pytest.raises(ValueError, match="expected a capture"):
        pipe(tmp_path / "x.pcap")
    run = CliRunner().invoke(classify_flows, [MODEL, str(tmp_path / "x.pcap"), str(SAMPLE), "--keep-going"])
    assert run.exit_code != 0 or "failed" in run.output
    assert "flows:" in run.output


def test_published_class_names():
    assert {name: len(label_set(name)) for name in ("ciciot2022", "iscxvpn2016", "iscxtor2016", "ustc_tfc2016")} == {
        "ciciot2022": 6,
        "iscxvpn2016": 7,
        "iscxtor2016": 8,
        "ustc_tfc2016": 20,
    }
    for name in ("ciciot2022", "iscxvpn2016", "iscxtor2016", "ustc_tfc2016"):
        assert label_set(name) == sorted(label_set(name))  # the order of the authors' loader
        assert zoo.create(f"netmamba_{name}", device="meta").num_classes == len(label_set(name))


def test_training_from_folders(tmp_path, traffic, monkeypatch):
    """The commands: pre-train, fine-tune from it, classify and validate with what was saved."""
    monkeypatch.chdir(tmp_path)
    traffic.write_folder("captures", 6, 1)
    small = ["--set", "embed_dim=8", "--set", "depth=1"]
    quick = ["--epochs", "1", "--warmup", "0", "--batch-size", "16"]
    decoder = ["--set", "decoder_embed_dim=8", "--set", "decoder_depth=1"]
    run = CliRunner().invoke(
        pretrain_flows,
        ["netmamba_pretrain", "captures", "--out", "pre", "--steps", "2", "--batch-size", "4", *small, *decoder],
        catch_exceptions=False,
    )
    assert "saved to pre" in run.output
    run = CliRunner().invoke(
        train_flows,
        ["netmamba_classifier", "captures", "--out", "tuned", "--pretrained", "./pre", "--json", *small, *quick],
        catch_exceptions=False,
    )
    found = json.loads(run.output)
    assert sum(found["flows"]) == len(read_folder("captures", FlowBytes()))
    measured = zoo.validate("./tuned", "captures")
    assert measured.samples == sum(found["flows"])
    assert set(measured.per_class) == set(traffic.PROTOCOLS)
    answer = zoo.pipeline("./tuned")("captures/dns/capture.pcap")
    assert {f.label for f in answer.flows} <= set(traffic.PROTOCOLS)
    with pytest.raises(Exception, match="expected a classifier"):
        CliRunner().invoke(
            train_flows, ["netmamba_pretrain", "captures", "--out", "x"], catch_exceptions=False, standalone_mode=False
        )


def test_pictures_and_splits(tmp_path):
    """The authors' data: 40 x 40 grey pictures in train, valid and test folders."""
    r = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        for name in ("b", "a"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            Image.fromarray(r.integers(0, 256, (40, 40)).astype(np.uint8)).save(place / "flow.png")
    train, _, test = read_splits(tmp_path, FlowBytes())
    assert train.classes == ["a", "b"]
    assert train.flows.shape == (2, 1600)
    assert (test.labels == [0, 1]).all()
    Image.new("L", (20, 20)).save(tmp_path / "train" / "a" / "small.png")
    with pytest.raises(ValueError, match=r"small\.png holds 400 bytes; expected 1600"):
        read_splits(tmp_path, FlowBytes())
    with pytest.raises(ValueError, match="which is none of x"):
        read_folder(tmp_path / "valid", FlowBytes(), classes=["x"])
    with pytest.raises(ValueError, match="no subfolder with captures"):
        read_folder(tmp_path / "valid" / "a", FlowBytes())
    with pytest.raises(ValueError, match="at least 10 are needed"):
        read_splits(tmp_path / "valid", FlowBytes())


def test_augmented_folders(tmp_path):
    place = tmp_path / "a"
    place.mkdir()
    (place / "x.pcap").write_bytes(pcap([(i, ethernet(ipv4(udp(bytes([i])), 17))) for i in range(9)]))
    assert len(read_folder(tmp_path, FlowBytes())) == 1
    assert len(read_folder(tmp_path, FlowBytes(), augment=True)) == 5


def test_other_lengths_need_settings():
    with pytest.raises(ValueError, match="are 1600, but the model reads 400"):
        representation_for(400, {})
    assert representation_for(400, {"header_bytes": 80, "payload_bytes": 0}).size == 400


def test_unknown_protocols_are_not_in_the_generator(traffic):
    assert sorted(traffic.PROTOCOLS) == label_set(SAMPLE.parent / "generated_classes.txt")


@pytest.mark.slow
def test_the_cards_figures_hold():
    """The recipe's test captures are generated from a seed, so its figures can be taken again."""
    from zoo_network.training import predict, scores

    train = recipe("network", "train_demo")
    test = train.flows_of(150, 3)
    found, _ = scores(predict(zoo.load(MODEL), test.flows), test.labels, train.CLASSES)
    for metric in zoo.info(MODEL).weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.002)


def test_link_types_that_are_not_taken_apart(pipe):
    """Wireless captures look as if nothing in them were IP; that is said."""
    notes = pipe(pcap([(0, bytes(60)), (1, bytes(60))], link=127)).notes
    assert notes == ["2 packets of the link type 127, which is not taken apart, belong to no flow"]


def test_captures_put_together(pipe):
    """Packets that are out of order in time: the file's order counts, and the flow's times are its first and last."""
    frame = ethernet(ipv4(udp(b"abc"), 17))
    answer = pipe(pcap([(50, frame), (60, frame), (10, frame), (20, frame)]))
    assert (answer.flows[0].first, answer.flows[0].last) == (10, 60)
    assert answer.notes == ["1 packets are earlier than the one before: flows are in the order of the file"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timeout": 0.0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"labels": ["a"] * 8}, "'a' is there twice"),
        ({"top_k": 0}, "top_k is 0"),
        ({"flows_per_batch": 0}, "flows_per_batch is 0"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        zoo.pipeline(MODEL, **options)
    if "timeout" in options:
        run = CliRunner().invoke(classify_flows, [MODEL, str(SAMPLE), "--timeout", str(options["timeout"])])
        assert match in str(run.exception)


def test_label_files_of_other_editors(tmp_path, pipe):
    text = "\r\n".join(pipe.names)
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert label_set(tmp_path / "names.txt") == pipe.names


def test_hidden_files_are_no_captures(tmp_path, pipe):
    """What a file manager leaves beside captures is neither one of them nor a class."""
    for place in ("a/1.pcap", "a/._1.pcap", ".cache/2.pcap", "b/3.pcap"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(SAMPLE.read_bytes() if "._" not in place else b"\0\5\x16\7")
    assert read_folder(tmp_path, pipe.representation).classes == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        files_in(tmp_path / "absent")


def test_damaged_pictures_and_empty_parts(tmp_path, pipe):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png"):
        read_folder(tmp_path, pipe.representation)
    frames = pcap([(0, ethernet(ipv6(udp(b"x"), 17), 0x86DD))])
    for part in ("train", "valid", "test"):
        (tmp_path / "s" / part / "a").mkdir(parents=True)
        (tmp_path / "s" / part / "a" / "1.pcap").write_bytes(frames if part == "valid" else SAMPLE.read_bytes())
    with pytest.raises(ValueError, match="valid holds no flows of IPv4"):
        read_splits(tmp_path / "s", pipe.representation)


def test_a_trained_model_splits_as_it_was_trained(tmp_path, traffic, monkeypatch):
    monkeypatch.chdir(tmp_path)
    traffic.write_folder("captures", 3, 1)
    small = ["--set", "embed_dim=16", "--set", "depth=1", "--epochs", "1", "--warmup", "0", "--json", "--bidirectional"]
    run = CliRunner().invoke(train_flows, ["netmamba_classifier", "captures", "--out", "tuned", *small])
    assert run.exit_code == 0, run.output
    capture = sorted(Path("captures").rglob("*.pcap"))[0]
    joined, apart = zoo.pipeline("./tuned")(capture), zoo.pipeline("./tuned", bidirectional=False)(capture)
    assert len(joined.flows) < len(apart.flows)
    assert len(joined.flows) == len(split_flows(read_capture(capture).packets, bidirectional=True))
    for option in (["--loss", "focal"], ["--smoothing", "1"], ["--layer-decay", "0"]):
        run = CliRunner().invoke(train_flows, ["netmamba_classifier", "captures", "--out", "other", *option])
        assert run.exit_code == 2
    assert not Path("other").exists()
