"""A capture file in, the class of every flow out."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.files import whole
from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .captures import Capture, Packet, stream_packets
from .data import CAPTURES, label_set, representation_for
from .flows import Flow, split_flows, to_tensor
from .packets import LINKS, NAMES

COLUMNS = (
    "source", "source_port", "destination", "destination_port", "protocol", "packets", "bytes", "first", "last",
    "label", "confidence",
)  # fmt: skip


@dataclass
class FlowClass:
    """One flow's answer. ``label`` is empty and ``confidence`` None where the model has no bytes to read (IPv6)."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    protocol: str
    packets: int
    bytes: int  #: on the wire
    first: float  #: seconds since 1970
    last: float
    label: str
    confidence: float | None
    shares: dict[str, float] = field(default_factory=dict)  #: the likeliest classes, best first


@dataclass(kw_only=True)
class TrafficClasses(Result):
    """The flows of one capture, in the order of their first packets."""

    flows: list[FlowClass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  #: what was left out, or found damaged

    def summary(self) -> str:
        counts = Counter(flow.label or "no class" for flow in self.flows)
        return f"{len(self.flows)} flows: " + ", ".join(f"{n} {label}" for label, n in counts.most_common())

    def __str__(self) -> str:
        rows = [f"{self.source}: {self.summary()}"]
        for flow in self.flows:
            ends = f"{flow.source}:{flow.source_port} > {flow.destination}:{flow.destination_port}"
            sure = "" if flow.confidence is None else f" ({flow.confidence:.1%})"
            rows.append(f"  {flow.protocol:5} {ends}  {flow.packets} packets: {flow.label or 'no class'}{sure}")
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])

    def save_csv(self, path: str | Path) -> Path:
        """One row a flow, columns :data:`COLUMNS`."""
        path = Path(path)
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for flow in self.flows:
                values = [getattr(flow, name) for name in COLUMNS]
                values[-1] = "" if flow.confidence is None else f"{flow.confidence:.6f}"
                writer.writerow(values)
        return path


class Sample(NamedTuple):
    flows: list[Flow]
    notes: list[str]


class _Seen:
    """Packets as they come, counted: all, those of link types that are not taken apart, and steps back in time."""

    def __init__(self, packets: Iterable[Packet]) -> None:
        self.packets = packets
        self.count = self.back = 0
        self.foreign: Counter[int] = Counter()

    def __iter__(self) -> Iterator[Packet]:
        last = -math.inf
        for packet in self.packets:
            self.count += 1
            self.back += packet.time < last
            last = packet.time
            if packet.link not in LINKS:
                self.foreign[packet.link] += 1
            yield packet


class FlowPipeline(Pipeline):
    """What the tasks of flows share: captures to flows, flows to the bytes that a model was trained on."""

    extensions = CAPTURES
    #: what a flow of IPv6 does not get
    answer = "answer"

    def __init__(
        self,
        model: nn.Module,
        bidirectional: bool | None,
        timeout: float | None,
        flows_per_batch: int,
        **representation: int | None,
    ) -> None:
        super().__init__(model)
        if flows_per_batch < 1:
            raise errors.BadArgument(
                f"flows_per_batch is {flows_per_batch}; expected 1 or more", argument="flows_per_batch", accepted=[]
            )
        split_flows([], timeout=timeout)  # says now what is wrong with it
        settings = {k: int(v) for k, v in self.preprocess.items() if k in representation}
        settings |= {k: v for k, v in representation.items() if v is not None}
        self.representation = representation_for(model.byte_length, settings)  # type: ignore[arg-type]
        own = bool(self.preprocess.get("bidirectional", False))
        self.bidirectional = own if bidirectional is None else bidirectional
        self.timeout, self.flows_per_batch = timeout, flows_per_batch

    def read(self, source: Any) -> Sample:
        """A path, the file's bytes, or a :class:`~zoo_network.captures.Capture`; holds the first packets of flows."""
        whole_capture = isinstance(source, Capture)
        notes = list(source.notes) if whole_capture else []
        seen = _Seen(source.packets if whole_capture else stream_packets(source, notes))
        flows = split_flows(
            seen,
            keep=self.representation.packets,
            bidirectional=self.bidirectional,
            timeout=self.timeout,
        )
        for link, count in sorted(seen.foreign.items()):
            notes.append(f"{count} packets of the link type {link}, which is not taken apart, belong to no flow")
        if others := seen.count - sum(seen.foreign.values()) - sum(flow.packets for flow in flows):
            notes.append(f"{others} packets without IP belong to no flow")
        if seen.back:
            notes.append(f"{seen.back} packets are earlier than the one before: flows are in the order of the file")
        if ipv6 := sum(flow.version == 6 for flow in flows):
            notes.append(f"{ipv6} flows of IPv6 have no {self.answer}: the model was trained on the bytes of IPv4")
        return Sample(flows, notes)

    def rows(self, sample: Sample) -> Tensor:
        """The flows of IPv4 scaled to [-1, 1], (flows, bytes)."""
        rows = [to_tensor(self.representation(flow.kept)) for flow in sample.flows if flow.version == 4]
        return torch.stack(rows) if rows else torch.zeros(0, self.representation.size)


class TrafficClassification(FlowPipeline):
    """Captures (pcap, pcapng) to the class of each flow.

    top_k: classes of each flow in ``shares``. labels: class names for weights whose card has none: a list, a published
    set's name (ciciot2022, iscxvpn2016, iscxtor2016, ustc_tfc2016) or a text file. bidirectional, timeout: as in
    :func:`zoo_network.flows.split_flows` (bidirectional: as in training unless given). packets, header_bytes,
    payload_bytes: the bytes of a flow, for models that were trained on others than 5 x (80 + 240). flows_per_batch: how
    many go through the model at a time.
    """

    task = "traffic-classification"
    answer = "class"

    def __init__(
        self,
        model: nn.Module,
        top_k: int = 3,
        labels: str | Sequence[str] | None = None,
        bidirectional: bool | None = None,
        timeout: float | None = None,
        packets: int | None = None,
        header_bytes: int | None = None,
        payload_bytes: int | None = None,
        flows_per_batch: int = 128,
    ) -> None:
        super().__init__(
            model,
            bidirectional,
            timeout,
            flows_per_batch,
            packets=packets,
            header_bytes=header_bytes,
            payload_bytes=payload_bytes,
        )
        if top_k < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        self.top_k = top_k
        count = int(model.num_classes)  # type: ignore[arg-type]
        named = label_set(labels) if isinstance(labels, str) else labels
        self.names = list(named or self.labels() or [f"class {i}" for i in range(count)])
        if len(self.names) != count:
            raise ValueError(f"there are {len(self.names)} labels, and the model has {count} classes; give labels=")
        if twice := [name for name, times in Counter(self.names).items() if times > 1]:
            raise ValueError(f"the label {twice[0]!r} is there twice; expected a name of its own for each class")

    def prepare(self, sample: Sample) -> Tensor:
        return self.rows(sample)

    def forward(self, batch: Any) -> Tensor:
        """(captures, flows, bytes) to shares (captures, flows, classes)."""
        flows = batch.flatten(0, 1)
        parts = [self.model(part).float().softmax(1) for part in flows.split(self.flows_per_batch) if len(part)]
        shares = torch.cat(parts) if parts else flows.new_zeros(0, len(self.names))
        return shares.unflatten(0, batch.shape[:2])

    def finish(self, output: Tensor, sample: Sample) -> TrafficClasses:
        rows, found = iter(output), []
        for flow in sample.flows:
            shares: dict[str, float] = {}
            if flow.version == 4:
                best = next(rows).topk(min(self.top_k, len(self.names)))
                shares = {self.names[i]: float(p) for p, i in zip(*(t.tolist() for t in best), strict=True)}
            ends = flow.endpoints
            found.append(
                FlowClass(
                    ends.source,
                    ends.source_port,
                    ends.destination,
                    ends.destination_port,
                    NAMES.get(ends.protocol, str(ends.protocol)),
                    flow.packets,
                    flow.bytes,
                    flow.first,
                    flow.last,
                    next(iter(shares), ""),
                    next(iter(shares.values()), None),
                    shares,
                )
            )
        return TrafficClasses(flows=found, notes=sample.notes)
