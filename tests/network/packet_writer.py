"""Frames for the tests, written field by field."""

from __future__ import annotations

import struct


def ipv4(body: bytes, protocol: int, *, piece: int = 0x4000, number: int = 1, total: int | None = None) -> bytes:
    head = struct.pack(
        ">BBHHHBBH", 0x45, 0, 20 + len(body) if total is None else total, number, piece, 64, protocol, 0xBEEF
    )
    return head + bytes([10, 0, 0, 1]) + bytes([10, 0, 0, 2]) + body


def udp(payload: bytes, source: int = 4000, target: int = 9999) -> bytes:
    return struct.pack(">HHHH", source, target, 8 + len(payload), 0) + payload


def tcp(payload: bytes, source: int = 4000, target: int = 80, options: bytes = b"") -> bytes:
    size = (20 + len(options)) // 4 << 4
    return struct.pack(">HHIIBBHHH", source, target, 1, 2, size, 0x18, 1000, 0, 0) + options + payload


def ipv6(body: bytes, protocol: int, extensions: bytes = b"") -> bytes:
    body = extensions + body
    return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + bytes(15) + b"\1" + bytes(15) + b"\2" + body


def ethernet(ip: bytes, kind: int = 0x0800, tags: bytes = b"") -> bytes:
    return bytes(range(12)) + tags + struct.pack(">H", kind) + ip


def pcap(frames: list[tuple[float, bytes]], order: str = "<", nanoseconds: bool = False, link: int = 1) -> bytes:
    ticks = 10**9 if nanoseconds else 10**6
    out = struct.pack(order + "IHHiIII", 0xA1B23C4D if nanoseconds else 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    for time, data in frames:
        seconds, part = divmod(round(time * ticks), ticks)
        out += struct.pack(order + "IIII", seconds, part, len(data), len(data) + 7) + data
    return out


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    size = len(body) + 12
    return struct.pack(order + "II", kind, size) + body + struct.pack(order + "I", size)


def pcapng(
    frames: list[tuple[float, bytes]], order: str = "<", resolution: int | None = None, offset: int = 0
) -> bytes:
    out = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    options, ticks = b"", 10**6
    if resolution is not None:
        options += struct.pack(order + "HHBxxx", 9, 1, resolution)
        ticks = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
    if offset:
        options += struct.pack(order + "HHq", 14, 8, offset)
    out += block(1, struct.pack(order + "HHI", 1, 0, 0) + options + bytes(4), order)
    for time, data in frames:
        stamp = round((time - offset) * ticks)
        head = struct.pack(order + "IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(data), len(data) + 7)
        out += block(6, head + data + bytes(-len(data) % 4), order)
    return out
