"""Capture files: classic pcap and pcapng to packets with their times, whatever the byte order and the resolution.

Formats: IETF draft-ietf-opsawg-pcap (magic 0xa1b2c3d4, nanoseconds 0xa1b23c4d, either byte order) and
draft-ietf-opsawg-pcapng (section header, interface description, enhanced, simple and the obsolete packet block).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zoo.files import existing, refused, whole

#: first four bytes -> (byte order, ticks a second)
_PCAP = {
    b"\xd4\xc3\xb2\xa1": ("<", 1_000_000),
    b"\xa1\xb2\xc3\xd4": (">", 1_000_000),
    b"\x4d\x3c\xb2\xa1": ("<", 1_000_000_000),
    b"\xa1\xb2\x3c\x4d": (">", 1_000_000_000),
}
_SECTION = b"\x0a\x0d\x0d\x0a"
_ORDERS = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
#: Beyond what any capture program writes for one packet; a larger length means a damaged file.
_LARGEST = 1 << 24


class Packet(NamedTuple):
    """One captured packet: ``data`` as it was on the wire, cut to the capture's length."""

    time: float  #: seconds since 1970
    data: bytes  #: captured bytes, beginning with the link layer
    length: int  #: bytes on the wire; above len(data) where the capture cut it off
    link: int  #: link type (LINKTYPE_*, 1: Ethernet)


@dataclass
class Capture:
    """The packets of a file, in its order, and what a reader must know about it."""

    packets: list[Packet]
    notes: list[str] = field(default_factory=list)  #: for example that the file ends within a packet

    def __len__(self) -> int:
        return len(self.packets)


def read_capture(source: str | Path | bytes) -> Capture:
    """Read a pcap or pcapng file (a path, or the bytes themselves).

    A file that ends within a packet gives the packets before it and a note. Raises BadFile (a ValueError) for a file of
    another format, an empty one and one whose structure is damaged, naming the file and the place; LocalFileMissing.
    """
    notes: list[str] = []
    return Capture(list(stream_packets(source, notes)), notes)


def stream_packets(source: str | Path | bytes, notes: list[str]) -> Iterator[Packet]:
    """The packets of :func:`read_capture` one by one, so that a capture may be larger than memory. What a reader must
    know is appended to ``notes`` on the way."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        with refused("the bytes"):
            yield from _packets(data, f"{len(data)} bytes in memory", notes)
        return
    path = existing(source, "a capture in the format pcap or pcapng")
    with refused(path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is empty; expected a capture in the format pcap or pcapng")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield from _packets(mapped, str(path), notes)


def _packets(data: bytes | mmap.mmap, name: str, notes: list[str]) -> Iterator[Packet]:
    start = data[:4]
    if start in _PCAP:
        return _pcap(data, name, notes)
    if start == _SECTION:
        return _pcapng(data, name, notes)
    what = f"begins with the bytes {start.hex(' ')}" if start else "is empty"
    hint = "; unpack it first" if start[:2] == b"\x1f\x8b" else ""
    raise ValueError(f"{name} {what}; expected a capture in the format pcap or pcapng{hint}")


def _pcap(data: bytes | mmap.mmap, name: str, notes: list[str]) -> Iterator[Packet]:
    order, ticks = _PCAP[data[:4]]
    if len(data) < 24:
        raise ValueError(f"{name} ends within its file header ({len(data)} of 24 bytes); it is not a whole capture")
    link = struct.unpack_from(order + "I", data, 20)[0] & 0x0FFFFFFF  # the upper bits say whether checksums follow
    header, position, count = struct.Struct(order + "IIII"), 24, 0
    while position < len(data):
        if position + 16 > len(data):
            notes.append(f"the file ends within the header of packet {count + 1}")
            return
        seconds, part, captured, length = header.unpack_from(data, position)
        if captured > _LARGEST:
            raise ValueError(
                f"{name}: packet {count + 1} at byte {position} says that it has {captured} bytes; the file is damaged"
            )
        position += 16
        if position + captured > len(data):
            notes.append(f"the file ends within packet {count + 1}")
            return
        yield Packet(seconds + part / ticks, data[position : position + captured], length, link)
        position += captured
        count += 1


@dataclass
class _Interface:
    link: int
    ticks: int
    offset: int  #: seconds to add
    snapshot: int


def _pcapng(data: bytes | mmap.mmap, name: str, notes: list[str]) -> Iterator[Packet]:
    order, position = "<", 0
    interfaces: list[_Interface] = []
    while position < len(data):
        if position + 12 > len(data):
            if not position:
                raise ValueError(f"{name} ends within its first block ({len(data)} bytes); it is not a whole capture")
            notes.append("the file ends within the header of a block")
            return
        if data[position : position + 4] == _SECTION:
            magic = data[position + 8 : position + 12]
            if magic not in _ORDERS:
                raise ValueError(f"{name}: the section at byte {position} has no byte-order mark; the file is damaged")
            order, interfaces = _ORDERS[magic], []
        kind, size = struct.unpack_from(order + "II", data, position)
        if size < 12 or size % 4 or size > _LARGEST:
            raise ValueError(f"{name}: the block at byte {position} says that it has {size} bytes; the file is damaged")
        if position + size > len(data):
            notes.append("the file ends within a block")
            return
        body = data[position + 8 : position + size - 4]
        try:
            if kind == 1:
                interfaces.append(_interface(body, order))
            elif kind in (2, 3, 6):
                yield _packet(kind, body, order, interfaces)
        except (struct.error, IndexError) as error:
            raise ValueError(
                f"{name}: the block of type {kind} at byte {position} is damaged, or names an interface that was not "
                f"described ({error})"
            ) from error
        position += size


def _interface(body: bytes, order: str) -> _Interface:
    link, _, snapshot = struct.unpack_from(order + "HHI", body)
    found, position = _Interface(link, 1_000_000, 0, snapshot), 8
    while position + 4 <= len(body):
        code, size = struct.unpack_from(order + "HH", body, position)
        value = body[position + 4 : position + 4 + size]
        if code == 0:
            break
        if code == 9 and value:  # if_tsresol: a power of ten, or with the top bit of two
            found.ticks = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        if code == 14 and size == 8:  # if_tsoffset
            found.offset = struct.unpack(order + "q", value)[0]
        position += 4 + (size + 3) // 4 * 4
    return found


def _packet(kind: int, body: bytes, order: str, interfaces: list[_Interface]) -> Packet:
    if kind == 3:  # simple: no time, the first interface
        length = struct.unpack_from(order + "I", body)[0]
        own = interfaces[0]
        captured = min(length, own.snapshot or length)
        time, start = 0.0, 4
    else:
        if kind == 6:
            number, high, low, captured, length = struct.unpack_from(order + "IIIII", body)
        else:  # the obsolete packet block: a drop count lies beside the interface
            number, _, high, low, captured, length = struct.unpack_from(order + "HHIIII", body)
        own = interfaces[number]
        time, start = ((high << 32) | low) / own.ticks + own.offset, 20
    if start + captured > len(body):
        raise struct.error(f"{captured} bytes of packet in a block of {len(body)}")
    return Packet(time, body[start : start + captured], length, own.link)


def write_pcap(
    path: str | Path, packets: list[tuple[float, bytes]], *, link: int = 1, nanoseconds: bool = False
) -> Path:
    """Write (time, bytes) pairs as a classic little-endian pcap file."""
    ticks = 1_000_000_000 if nanoseconds else 1_000_000
    out = [struct.pack("<IHHiIII", 0xA1B23C4D if nanoseconds else 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)]
    for time, data in packets:
        seconds = int(time)  # apart: nanoseconds since 1970 are more digits than a float has
        carried, part = divmod(round((time - seconds) * ticks), ticks)
        out.append(struct.pack("<IIII", seconds + carried, part, len(data), len(data)) + data)
    with whole(path) as work:
        work.write_bytes(b"".join(out))
    return Path(path)
