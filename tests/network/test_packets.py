"""Packets taken apart: link layers, ports, fragments, and where the application's bytes begin."""

import struct

import pytest

from zoo_network.captures import Packet
from zoo_network.flows import FlowBytes, split_flows
from zoo_network.packets import header, network_layer, raw_start

from .packet_writer import ethernet, ipv4, ipv6, tcp, udp


def packet(data: bytes, link: int = 1, time: float = 0.0) -> Packet:
    return Packet(time, data, len(data), link)


IP = ipv4(udp(b"payload"), 17)


@pytest.mark.parametrize(
    ("data", "link"),
    [
        (ethernet(IP), 1),
        (ethernet(IP, tags=struct.pack(">HH", 0x8100, 7)), 1),
        (ethernet(IP, tags=struct.pack(">HHHH", 0x88A8, 7, 0x8100, 8)), 1),
        (ethernet(struct.pack(">BBHHH", 0x11, 0, 1, len(IP) + 2, 0x0021) + IP, 0x8864), 1),
        (IP, 101),
        (b"\2\0\0\0" + IP, 0),
        (bytes(14) + b"\x08\x00" + IP, 113),
        (b"\x08\x00" + bytes(18) + IP, 276),
    ],
)
def test_link_layers(data, link):
    assert network_layer(packet(data, link)) == (0x0800, IP)


def test_what_is_no_ip():
    for data, link in ((ethernet(bytes(28), 0x0806), 1), (ethernet(IP[:19]), 1), (b"", 1), (b"", 101), (IP, 147)):
        assert network_layer(packet(data, link)) == (0, b"")


def test_endpoints():
    ends = header(0x0800, IP).endpoints
    assert str(ends) == "UDP 10.0.0.1:4000 > 10.0.0.2:9999"
    assert str(header(0x86DD, ipv6(tcp(b""), 6)).endpoints) == "TCP [::1]:4000 > [::2]:80"
    hop_by_hop = struct.pack(">BB6x", 17, 0)
    assert str(header(0x86DD, ipv6(udp(b""), 0, hop_by_hop)).endpoints) == "UDP [::1]:4000 > [::2]:9999"


RAW = {
    "tcp": (tcp(b"data"), 6, 20),
    "dhcp": (udp(bytes(28), source=68, target=67), 17, None),
    "dhcp from elsewhere": (udp(bytes(28), target=67), 17, 8),
    "dhcp cut off": (udp(bytes(27), source=68, target=67), 17, 8),
    "tcp with options": (tcp(b"data", options=b"\1\1\1\1"), 6, 24),
    "tcp without data": (tcp(b""), 6, None),
    "tcp on port 53": (tcp(b"data", target=53), 6, 20),
    "tcp cut off": (tcp(b"")[:12], 6, 0),
    "udp": (udp(b"data"), 17, 8),
    "udp without data": (udp(b""), 17, None),
    "udp cut off": (udp(b"")[:5], 17, 0),
    "dns": (udp(bytes(5) + b"\1" + bytes(6) + b"\3abc\0\0\1\0\1", target=53), 17, None),
    "dns, more behind it": (udp(bytes(5) + b"\1" + bytes(6) + b"\3abc\0\0\1\0\1tail", target=53), 17, 8 + 21),
    "dns, short": (udp(b"too short", target=5353), 17, 8),
    "dns, question cut off": (udp(bytes(5) + b"\2" + bytes(6) + b"\3abc\0\0\1\0\1\2xy\0\0\1", source=53), 17, 8 + 21),
    "dns, a pointer": (udp(bytes(5) + b"\1" + bytes(6) + b"\1a\xc0\x0c\0\1\0\1rest", target=53), 17, 8 + 20),
    "dns, an answer": (
        udp(bytes(5) + b"\1\0\1" + bytes(4) + b"\1a\0\0\1\0\1\xc0\x0c\0\1\0\1\0\0\0\0\0\4ABCD", target=53),
        17,
        None,
    ),
    "ntp": (udp(b"\x23" + bytes(47), target=123), 17, None),
    "echo": (b"\x08\0\0\0\0\1\0\1ping", 1, 8),
    "timestamp": (b"\x0d" + bytes(19) + b"rest", 1, 20),
    "unreachable": (b"\3\1" + bytes(6) + ipv4(udp(b""), 17), 1, None),
    "unreachable, with data": (b"\3\1" + bytes(6) + ipv4(udp(b"abcd"), 17), 1, 8 + 28),
    "unreachable, quoting dns": (b"\3\1" + bytes(6) + ipv4(udp(bytes(12), target=53), 17), 1, 8 + 28),
    "unreachable, 8 bytes of tcp": (b"\3\1" + bytes(6) + ipv4(tcp(b"")[:8], 6, total=40), 1, None),
    "ip in ip": (ipv4(udp(b"abcd"), 17), 4, 28),
    "another protocol": (b"anything", 89, 0),
    "nothing": (b"", 6, None),
}


@pytest.mark.parametrize("case", RAW)
def test_where_raw_begins(case):
    body, protocol, expected = RAW[case]
    assert raw_start(ipv4(body, protocol)) == (None if expected is None else 20 + expected)


def test_trailer_and_offloaded_lengths():
    """Bytes behind the IP total length are the tail of Raw where there is one; a length of 0 means all."""
    representation = FlowBytes()
    with_raw = representation.packet(packet(ethernet(ipv4(tcp(b"data"), 6) + b"TRAILER")))
    assert with_raw[80:91] == b"dataTRAILER"
    without = representation.packet(packet(ethernet(ipv4(tcp(b""), 6) + b"TRAILER")))
    assert without[40:47] == b"TRAILER"
    assert not any(without[80:])
    assert raw_start(ipv4(tcp(b"data"), 6, total=0)) == 40


def test_representation():
    """Addresses are zero, the checksum stays, the payload is taken out of the header's bytes."""
    found = FlowBytes().packet(packet(ethernet(IP)))
    assert len(found) == 320
    assert found[10:12] == b"\xbe\xef"
    assert found[12:20] == bytes(8)
    assert found[28:80] == bytes(52)
    assert found[80:87] == b"payload"
    kept = FlowBytes(remove_ip=False).packet(packet(ethernet(IP)))
    assert kept[12:20] == IP[12:20]
    alone = FlowBytes(keep_payload=False).packet(packet(ethernet(IP)))
    assert alone[28:35] == b"payload"
    assert not any(alone[80:])


def test_payload_is_removed_as_text():
    """A payload of 0x40 whose digits also stand in the header, across bytes: the original removes them all."""
    found = FlowBytes().packet(packet(ethernet(ipv4(udp(b"\x11"), 17))))
    head = ipv4(udp(b"\x11"), 17)
    digits = (head[:12] + bytes(8) + head[20:]).hex().replace("11", "")
    assert found[:80].hex() == digits[:160].ljust(160, "0")
    assert len(digits) < 2 * len(head) - 2


def test_packets_without_ipv4_count_and_are_zero():
    packets = [packet(ethernet(bytes(28), 0x0806)), packet(ethernet(IP)), packet(ethernet(ipv6(tcp(b"x"), 6), 0x86DD))]
    flow = FlowBytes()(packets)
    assert flow.shape == (1600,)
    assert not flow[:320].any()
    assert flow[320:640].any()
    assert not flow[640:].any()


def test_windows():
    packets = [packet(ethernet(ipv4(udp(bytes([i + 1])), 17))) for i in range(7)]
    windows = FlowBytes().windows(packets)
    assert windows.shape == (3, 1600)
    assert (windows[2] == FlowBytes()(packets[2:])).all()
    assert FlowBytes().windows(packets[:3]).shape == (1, 1600)


def test_flows_are_directed_unless_asked():
    there, back = ethernet(ipv4(tcp(b"a"), 6)), bytearray(ethernet(ipv4(tcp(b"b", 80, 4000), 6)))
    back[26:30], back[30:34] = back[30:34], back[26:30]
    packets = [packet(there, time=0), packet(bytes(back), time=1), packet(there, time=50), packet(bytes(12), time=51)]
    assert [f.packets for f in split_flows(packets)] == [2, 1]
    assert [f.packets for f in split_flows(packets, bidirectional=True)] == [3]
    assert [f.packets for f in split_flows(packets, timeout=10)] == [1, 1, 1]
    assert len(split_flows(packets, keep=1)[0].kept) == 1
    with pytest.raises(ValueError, match="timeout is 0"):
        split_flows(packets, timeout=0)


def test_fragments_follow_their_datagram():
    first = ipv4(udp(b"12345678"), 17, piece=0x2000, number=9)
    later = ipv4(b"rest of it", 17, piece=2, number=9)
    other = ipv4(b"rest of another", 17, piece=2, number=10)
    flows = split_flows([packet(ethernet(ip)) for ip in (first, later, other)])
    assert [(f.endpoints.source_port, f.packets) for f in flows] == [(4000, 2), (0, 1)]
    assert raw_start(later) == 20


def test_bad_representations():
    with pytest.raises(ValueError, match="header_bytes is 0"):
        FlowBytes(header_bytes=0)
