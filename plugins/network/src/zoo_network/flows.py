"""From packets to flows, and from a flow to the bytes that NetMamba reads.

Source: wangtz19/NetMamba ``dataset/dataset_common.py`` (bytes) and the splitter that its ``dataset/README.md`` names
(flows by five-tuple, each direction a flow of its own).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zoo_registry import errors

from .captures import Packet
from .packets import Endpoints, header, network_layer, raw_start

_IPV4, _IPV6 = 0x0800, 0x86DD


@dataclass(frozen=True, kw_only=True)
class FlowBytes:
    """The bytes of a flow: its first packets, of each the head of the IP layer and the head of the payload.

    packets: how many packets count; header_bytes, payload_bytes: of each, cut off or filled with zeros; remove_ip: the
    addresses in the IP header are set to 0.0.0.0 (the checksum stays); keep_payload: False leaves the payload zero, and
    what the transport carries then runs on in the header bytes.

    As in the original the payload is removed from the header's bytes as text of hexadecimal digits, wherever it
    occurs, and a packet without IPv4 (IPv6 too) is all zeros but still one of the flow's packets.
    """

    packets: int = 5
    header_bytes: int = 80
    payload_bytes: int = 240
    remove_ip: bool = True
    keep_payload: bool = True

    def __post_init__(self) -> None:
        for name in ("packets", "header_bytes", "payload_bytes"):
            value = getattr(self, name)
            if value < (0 if name == "payload_bytes" else 1):
                raise ValueError(f"{name} is {value}; expected a positive number")

    @property
    def size(self) -> int:
        """Bytes of a flow."""
        return self.packets * (self.header_bytes + self.payload_bytes)

    def replaced(self, **changes: int | bool) -> FlowBytes:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def packet(self, packet: Packet) -> bytes:
        """One packet's header_bytes + payload_bytes bytes."""
        kind, ip = network_layer(packet)
        if kind != _IPV4:
            return bytes(self.header_bytes + self.payload_bytes)
        start = raw_start(ip)
        payload = ip[start:].hex() if self.keep_payload and start is not None else ""
        if self.remove_ip:
            ip = ip[:12] + bytes(8) + ip[20:]
        head = ip.hex()
        if payload:
            head = head.replace(payload, "")
        width, length = 2 * self.header_bytes, 2 * self.payload_bytes
        return bytes.fromhex(head[:width].ljust(width, "0") + payload[:length].ljust(length, "0"))

    def __call__(self, packets: Sequence[Packet]) -> np.ndarray:
        """(size,) uint8 of a flow's packets, in their order; missing packets are zeros."""
        return self._joined([self.packet(p) for p in packets[: self.packets]])

    def windows(self, packets: Sequence[Packet]) -> np.ndarray:
        """(windows, size) uint8: every run of ``packets`` neighbouring packets (the original's augmentation)."""
        parts = [self.packet(p) for p in packets]
        starts = range(max(len(parts) - self.packets, 0) + 1)
        return np.stack([self._joined(parts[i : i + self.packets]) for i in starts])

    def _joined(self, parts: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(parts).ljust(self.size, b"\0"), dtype=np.uint8).copy()


def to_tensor(flows: np.ndarray) -> Tensor:
    """Flow bytes (..., size) uint8 as the model takes them: float32 in [-1, 1]."""
    return (torch.from_numpy(np.ascontiguousarray(flows)).float() / 255 - 0.5) / 0.5


@dataclass
class Flow:
    """Packets of one five-tuple: the first ones are kept, all are counted."""

    endpoints: Endpoints
    version: int  #: 4 or 6
    kept: list[Packet] = field(default_factory=list)
    packets: int = 0
    bytes: int = 0  #: on the wire
    first: float = 0.0  #: the earliest and the latest time of its packets, seconds since 1970
    last: float = 0.0

    def add(self, packet: Packet, keep: int) -> None:
        # Captures that were put together are not always in the order of their times.
        self.first = min(self.first, packet.time) if self.packets else packet.time
        self.last = max(self.last, packet.time) if self.packets else packet.time
        if len(self.kept) < keep:
            self.kept.append(packet)
        self.packets += 1
        self.bytes += packet.length


def split_flows(
    packets: Iterable[Packet], *, keep: int = 5, bidirectional: bool = False, timeout: float | None = None
) -> list[Flow]:
    """Flows by five-tuple, in the order of their first packets; packets without IP belong to none.

    keep: packets of each flow that are kept (0: all). bidirectional: both directions are one flow (the published models
    were trained on flows of one direction). timeout: a five-tuple that was silent for longer (seconds) begins a new
    flow; None: never, as the original. A fragment without ports follows its datagram's first fragment.
    """
    if timeout is not None and not timeout > 0:
        raise errors.BadArgument(
            f"timeout is {timeout}; expected a positive number of seconds, or None", argument="timeout", accepted=[]
        )
    flows: list[Flow] = []
    current: dict[Endpoints, Flow] = {}
    datagrams: dict[tuple[str, str, int, int], Endpoints] = {}
    limit = keep or sys.maxsize
    for packet in packets:
        kind, ip = network_layer(packet)
        if not kind:
            continue
        found = header(kind, ip)
        ends = found.endpoints
        if found.fragment is not None:
            if found.first:
                datagrams[found.fragment] = ends
            else:
                ends = datagrams.get(found.fragment, ends)
        key = min(ends, ends.reversed) if bidirectional else ends
        flow = current.get(key)
        if flow is None or (timeout is not None and packet.time - flow.last > timeout):
            flow = current[key] = Flow(ends, 4 if kind == _IPV4 else 6)
            flows.append(flow)
        flow.add(packet, limit)
    return flows
