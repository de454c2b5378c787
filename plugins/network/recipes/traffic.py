"""Generated traffic: captures of eight made-up protocols whose payloads have the structure of their namesakes.

No byte is from a real network. Every flow draws its addresses, times to live, sizes, names and contents anew; half the
servers listen on the usual port of their protocol and half on a random one, so that ports alone do not tell; a third of
the TCP captures begin in the middle of a connection, where little but record headers (or nothing at all, for what is
encrypted) is left to see. Both directions of a connection are flows of their own.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zoo_network.captures import write_pcap

Random = np.random.Generator
#: (from the client?, payload); the payloads of one connection in their order
Talk = list[tuple[bool, bytes]]
WORDS = [
    "media", "news", "shop", "cloud", "api", "static", "login", "photo", "mail",
    "search", "cache", "store", "edge", "play", "data", "home", "index", "map",
]  # fmt: skip
TOP = ["example", "test", "invalid", "localhost"]


def noise(r: Random, low: int, high: int) -> bytes:
    return r.bytes(int(r.integers(low, high + 1)))


def word(r: Random) -> str:
    return str(r.choice(WORDS)) + (str(r.integers(0, 1000)) if r.random() < 0.4 else "")


def host(r: Random) -> str:
    return ".".join([word(r) for _ in range(int(r.integers(1, 4)))] + [str(r.choice(TOP))])


# -- conversations


def dns(r: Random) -> Talk:
    talk: Talk = []
    for _ in range(int(r.integers(1, 4))):
        number, kind = int(r.integers(0, 65536)), int(r.choice([1, 28, 15, 16]))
        name = b"".join(bytes([len(p)]) + p.encode() for p in host(r).split(".")) + b"\0"
        question = name + struct.pack(">HH", kind, 1)
        talk.append((True, struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + question))
        answers = [
            struct.pack(">HHHIH", 0xC00C, kind, 1, int(r.integers(5, 86400)), size) + r.bytes(size)
            for size in ([4, 16, 20, 40][[1, 28, 15, 16].index(kind)],) * int(r.integers(1, 4))
        ]
        head = struct.pack(">HHHHHH", number, 0x8180, 1, len(answers), 0, 0)
        talk.append((False, head + question + b"".join(answers)))
    return talk


def http(r: Random) -> Talk:
    talk: Talk = []
    for _ in range(int(r.integers(1, 4))):
        path = "/".join(["", *(word(r) for _ in range(int(r.integers(1, 5))))])
        lines = [f"{r.choice(['GET', 'POST', 'HEAD'])} {path} HTTP/1.1", f"Host: {host(r)}"]
        lines += [f"{n}: {word(r)}/{r.integers(1, 99)}" for n in r.permutation(["User-Agent", "Accept", "Cookie"])]
        talk.append((True, "\r\n".join([*lines, "", ""]).encode()))
        status = str(r.choice(["200 OK", "304 Not Modified", "404 Not Found", "301 Moved Permanently"]))
        reply = [f"HTTP/1.1 {status}", f"Content-Type: text/{word(r)}", f"Content-Length: {r.integers(10, 9999)}"]
        body = " ".join(word(r) for _ in range(int(r.integers(5, 150))))
        talk.append((False, "\r\n".join([*reply, "", body]).encode()))
        talk += [(False, noise(r, 300, 1400)) for _ in range(int(r.integers(0, 4)))]
    return talk


def mail(r: Random) -> Talk:
    server, client = host(r), host(r)
    return [
        (False, f"220 {server} ESMTP {word(r)}\r\n".encode()),
        (True, f"EHLO {client}\r\n".encode()),
        (False, f"250-{server}\r\n250-SIZE {r.integers(10**6, 10**8)}\r\n250 {word(r).upper()}\r\n".encode()),
        (True, f"MAIL FROM:<{word(r)}@{client}>\r\n".encode()),
        (False, f"250 2.1.0 {word(r)}\r\n".encode()),
        (True, f"RCPT TO:<{word(r)}@{server}>\r\n".encode()),
        (False, b"250 2.1.5\r\n"),
        (True, b"DATA\r\n"),
        (False, b"354 go ahead\r\n"),
        *((True, " ".join(word(r) for _ in range(int(r.integers(20, 200)))).encode()) for _ in range(3)),
    ]


def mqtt(r: Random) -> Talk:
    def packet(kind: int, body: bytes) -> bytes:
        size, length = len(body), b""
        while True:
            size, rest = divmod(size, 128)
            length += bytes([rest | (0x80 if size else 0)])
            if not size:
                return bytes([kind]) + length + body

    def text(value: str) -> bytes:
        return struct.pack(">H", len(value)) + value.encode()

    talk: Talk = [
        (True, packet(0x10, text("MQTT") + b"\x04\x02" + struct.pack(">H", int(r.integers(10, 300))) + text(word(r)))),
        (False, packet(0x20, b"\x00\x00")),
    ]
    for _ in range(int(r.integers(3, 9))):
        reading = f'{{"{word(r)}": {r.normal() * 50:.2f}}}'.encode()
        talk.append((bool(r.random() < 0.7), packet(0x30, text(f"{word(r)}/{word(r)}") + reading)))
        if r.random() < 0.3:
            talk += [(True, packet(0xC0, b"")), (False, packet(0xD0, b""))]
    return talk


def ssh(r: Random) -> Talk:
    def exchange() -> bytes:
        names = ",".join(f"{word(r)}-sha2-{r.integers(1, 9)}@{host(r)}" for _ in range(int(r.integers(6, 14))))
        body = b"\x14" + r.bytes(16) + struct.pack(">I", len(names)) + names.encode() + bytes(int(r.integers(8, 20)))
        return struct.pack(">IB", len(body) + 5, 4) + body + r.bytes(4)

    talk: Talk = [(c, f"SSH-2.0-{word(r)}_{r.integers(1, 9)}.{r.integers(0, 9)}\r\n".encode()) for c in (True, False)]
    talk += [(True, exchange()), (False, exchange())]
    talk += [(bool(r.random() < 0.5), r.bytes(int(r.integers(2, 40)) * 8)) for _ in range(int(r.integers(4, 12)))]
    return talk


def tls(r: Random) -> Talk:
    def record(kind: int, body: bytes, version: int = 0x0303) -> bytes:
        return struct.pack(">BHH", kind, version, len(body)) + body

    name = host(r).encode()
    suites = r.bytes(2 * int(r.integers(4, 18)))
    names = (
        struct.pack(">HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name)) + name + r.bytes(int(r.integers(20, 90)))
    )
    hello = b"\x03\x03" + r.bytes(32) + b"\x20" + r.bytes(32) + struct.pack(">H", len(suites)) + suites + b"\x01\x00"
    hello += struct.pack(">H", len(names)) + names
    answer = b"\x03\x03" + r.bytes(32) + b"\x20" + r.bytes(32) + r.bytes(2) + b"\x00" + r.bytes(46)
    talk: Talk = [
        (True, record(22, b"\x01" + len(hello).to_bytes(3, "big") + hello, 0x0301)),
        (False, record(22, b"\x02" + len(answer).to_bytes(3, "big") + answer) + record(20, b"\x01")),
        (False, record(23, noise(r, 400, 1300))),
        (True, record(20, b"\x01") + record(23, noise(r, 40, 90))),
    ]
    return talk + [(bool(r.random() < 0.4), record(23, noise(r, 30, 1300))) for _ in range(int(r.integers(3, 10)))]


def tunnel(r: Random) -> Talk:
    ends = r.bytes(4), r.bytes(4)
    talk: Talk = [
        (True, b"\x01\0\0\0" + ends[0] + r.bytes(140)),
        (False, b"\x02\0\0\0" + ends[1] + ends[0] + r.bytes(80)),
    ]
    counts = [0, 0]
    for _ in range(int(r.integers(4, 14))):
        client = bool(r.random() < 0.5)
        size = 16 * int(r.integers(2, 80))
        talk.append((client, b"\x04\0\0\0" + ends[client] + struct.pack("<Q", counts[client]) + r.bytes(size)))
        counts[client] += 1
    return talk


def video(r: Random) -> Talk:
    source, stamp, number = r.bytes(4), int(r.integers(0, 2**31)), int(r.integers(0, 60000))
    kind, sender = int(r.integers(96, 110)), bool(r.random() < 0.5)
    talk: Talk = []
    for _ in range(int(r.integers(6, 20))):
        mark = 0x80 if r.random() < 0.25 else 0
        head = struct.pack(">BBHI", 0x80, kind | mark, number, stamp) + source
        talk.append((sender, head + noise(r, 500, 1350)))
        number, stamp = number + 1, stamp + (3000 if mark else 0)
        if r.random() < 0.1:
            talk.append((not sender, struct.pack(">BBH", 0x81, 201, 7) + r.bytes(4) + source + r.bytes(20)))
    return talk


#: name -> (conversation, over TCP?, usual port of the server)
PROTOCOLS: dict[str, tuple[Callable[[Random], Talk], bool, int]] = {
    "dns": (dns, False, 53),
    "http": (http, True, 80),
    "mail": (mail, True, 25),
    "mqtt": (mqtt, True, 1883),
    "ssh": (ssh, True, 22),
    "tls": (tls, True, 443),
    "tunnel": (tunnel, False, 51820),
    "video": (video, False, 5004),
}


# -- packets


def connection(r: Random, name: str, start: float) -> list[tuple[float, bytes]]:
    """The packets of one connection, Ethernet and IPv4, with their times."""
    talk_of, over_tcp, usual = PROTOCOLS[name]
    talk = talk_of(r)
    port = usual if r.random() < 0.5 else int(r.integers(1024, 49152))
    ends = [(bytes([10, *r.bytes(3)]), int(r.integers(49152, 65536))), (bytes([172, 16, *r.bytes(2)]), port)]
    lives, numbers = [int(r.choice([64, 128, 255])) - int(r.integers(0, 20)) for _ in ends], r.integers(0, 60000, 2)
    sequence = [int(v) for v in r.integers(0, 2**32 - 10**6, 2)]
    macs, tag = r.bytes(12), struct.pack(">HH", 0x8100, int(r.integers(1, 4000))) if r.random() < 0.1 else b""
    packets: list[tuple[float, bytes]] = []
    time = start

    def send(client: bool, payload: bytes, flags: int = 0x18, options: bytes = b"") -> None:
        nonlocal time
        (source, sport), (target, dport) = ends if client else ends[::-1]
        side = 0 if client else 1
        if over_tcp:
            size = (20 + len(options)) // 4 << 4
            window, check = int(r.integers(200, 65535)), int(r.integers(0, 65536))
            acknowledged = sequence[1 - side] if flags & 0x10 else 0
            head = struct.pack(">HHIIBBHHH", sport, dport, sequence[side], acknowledged, size, flags, window, check, 0)
            body = head + options + payload
            sequence[side] += len(payload) + (1 if flags & 3 else 0)
        else:
            body = struct.pack(">HHHH", sport, dport, 8 + len(payload), int(r.integers(0, 65536))) + payload
        numbers[side] += 1
        protocol, check = 6 if over_tcp else 17, int(r.integers(0, 65536))
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), int(numbers[side]), 0x4000, lives[side], protocol, check)
        frame = macs + tag + b"\x08\x00" + ip + source + target + body
        packets.append((time, frame.ljust(60, b"\0")))
        time += float(r.exponential(0.02))

    if over_tcp and r.random() < 1 / 3:
        talk = talk[int(r.integers(1, max(len(talk) - 2, 2))) :]  # the capture began in the middle
    elif over_tcp:
        maximum = b"\x02\x04" + struct.pack(">H", int(r.integers(1200, 1461)))
        send(True, b"", 0x02, maximum + b"\x04\x02\x01\x01")
        send(False, b"", 0x12, maximum)
        send(True, b"", 0x10)
    for client, payload in talk:
        for at in range(0, len(payload), 1400):
            send(client, payload[at : at + 1400])
        if over_tcp and r.random() < 0.3:
            send(not client, b"", 0x10)
    return packets


def capture(r: Random, names: list[str]) -> list[tuple[float, bytes]]:
    """Connections of the named protocols, begun within a minute of each other, their packets mixed by time."""
    packets = [p for name in names for p in connection(r, name, 1.7e9 + float(r.uniform(0, 60)))]
    return sorted(packets, key=lambda p: p[0])


def write_folder(folder: str | Path, connections: int, seed: int) -> Path:
    """``folder/CLASS/capture.pcap``, ``connections`` of each class."""
    r = np.random.default_rng(seed)
    for name in PROTOCOLS:
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        write_pcap(place / "capture.pcap", capture(r, [name] * connections))
    return Path(folder)


def main() -> None:
    """``python traffic.py folder --connections 50``: labelled captures to try ``zoo train-flows`` on."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    parser.add_argument("--connections", type=int, default=50, help="of each protocol")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_folder(arguments.out, arguments.connections, arguments.seed)


if __name__ == "__main__":
    main()
