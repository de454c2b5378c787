"""One packet taken apart as far as NetMamba's bytes need it: its IP layer, and where application data begin in it.

The original asks scapy for the layer "Raw", which is what scapy leaves undissected. The rules here are scapy 2.8's for
IPv4 with TCP, UDP (DNS, NTP and DHCP are dissected), ICMP and IP in IP; what follows any other protocol's number, and
every fragment but a datagram's first, is Raw from the end of the IP header. Protocols beyond these that scapy also
dissects on their usual ports (SNMP, SMB, ...) are Raw here.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import NamedTuple

from .captures import Packet

#: Link types (LINKTYPE_*) that are taken apart: BSD loopback, Ethernet, raw IP, Linux cooked.
LINKS = {0, 1, 12, 14, 101, 108, 113, 228, 229, 276}
_VLAN = {0x8100, 0x88A8, 0x9100}
_IPV4, _IPV6, _PPPOE = 0x0800, 0x86DD, 0x8864
_IPIP, _ICMP, _TCP, _UDP, _SCTP = 4, 1, 6, 17, 132
_EXTENSIONS = {0, 43, 60, 135}  #: IPv6 headers of (next, length) that others follow
_FRAGMENT, _AUTHENTICATION = 44, 51
_ICMP_ERRORS = {3, 4, 5, 11, 12}  #: ICMP types that carry the head of the packet they are about
_ICMP_SIZE = {13: 20, 14: 20, 17: 12, 18: 12}  #: bytes of the ICMP header where not 8
_BOOTP_PORTS, _BOOTP_SIZE = {(68, 67), (67, 68), (67, 67)}, 28  #: client and server; bytes before its padded fields
NAMES = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 47: "GRE", 50: "ESP", 58: "ICMPv6", 132: "SCTP"}


class Endpoints(NamedTuple):
    """The five-tuple of one direction of a flow. Ports are 0 where the protocol has none."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    protocol: int

    @property
    def reversed(self) -> Endpoints:
        return Endpoints(self.destination, self.destination_port, self.source, self.source_port, self.protocol)

    def __str__(self) -> str:
        name = NAMES.get(self.protocol, f"protocol {self.protocol}")
        ends = [
            f"{f'[{host}]' if ':' in host else host}:{port}" if port else host
            for host, port in ((self.source, self.source_port), (self.destination, self.destination_port))
        ]
        return f"{name} {ends[0]} > {ends[1]}"


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


# -- the link layer


def network_layer(packet: Packet) -> tuple[int, bytes]:
    """(0x0800 or 0x86DD, bytes from the IP header on); (0, b"") for anything else and for headers that are cut off.

    Link types: Ethernet (VLAN tags, also stacked; PPPoE sessions), raw IP, BSD loopback, Linux cooked v1 and v2.
    """
    data, link = packet.data, packet.link
    if link not in LINKS:
        return 0, b""
    if link == 1:
        kind, start = _u16(data, 12), 14
    elif link == 113:
        kind, start = _u16(data, 14), 16
    elif link == 276:
        kind, start = _u16(data, 0), 20
    elif link in (12, 14, 101, 228, 229):
        kind, start = _by_version(data), 0
    else:
        kind, start = _by_version(data[4:]), 4
    while kind in _VLAN:
        kind, start = _u16(data, start + 2), start + 4
    if kind == _PPPOE:
        kind = {0x0021: _IPV4, 0x0057: _IPV6}.get(_u16(data, start + 6), 0)
        start += 8
    found = data[start:]
    if (kind == _IPV4 and len(found) >= 20) or (kind == _IPV6 and len(found) >= 40):
        return kind, found
    return 0, b""


def _by_version(data: bytes) -> int:
    return {4: _IPV4, 6: _IPV6}.get(data[0] >> 4, 0) if data else 0


# -- who talks to whom


class Header(NamedTuple):
    """What flow splitting reads of an IP header."""

    endpoints: Endpoints
    fragment: tuple[str, str, int, int] | None  #: which datagram this is a piece of, None for whole datagrams
    first: bool  #: whether the transport header is in this piece


@functools.lru_cache(maxsize=1 << 16)
def _address(packed: bytes) -> str:
    """An address as text. A capture has the same few in most packets, and writing one takes longer than all else."""
    return str(ipaddress.ip_address(packed))


def header(kind: int, ip: bytes) -> Header:
    """The endpoints of an IP packet from :func:`network_layer`; ports are 0 in fragments but the first."""
    if kind == _IPV4:
        source, destination = _address(ip[12:16]), _address(ip[16:20])
        protocol, start, piece = ip[9], max((ip[0] & 15) * 4, 20), _u16(ip, 6)
        offset, more, number = piece & 0x1FFF, bool(piece & 0x2000), _u16(ip, 4)
    else:
        source, destination = _address(ip[8:24]), _address(ip[24:40])
        protocol, start, offset, more, number = _ipv6_payload(ip)
    ports = (0, 0)
    if offset == 0 and protocol in (_TCP, _UDP, _SCTP) and len(ip) >= start + 4:
        ports = _u16(ip, start), _u16(ip, start + 2)
    fragment = (source, destination, protocol, number) if offset or more else None
    return Header(Endpoints(source, ports[0], destination, ports[1], protocol), fragment, offset == 0)


def _ipv6_payload(ip: bytes) -> tuple[int, int, int, bool, int]:
    """(protocol, where it starts, fragment offset, more fragments, identification) behind the extension headers."""
    protocol, start, offset, more, number = ip[6], 40, 0, False, 0
    while start + 8 <= len(ip):
        if protocol in _EXTENSIONS:
            protocol, start = ip[start], start + 8 + 8 * ip[start + 1]
        elif protocol == _AUTHENTICATION:
            protocol, start = ip[start], start + 8 + 4 * ip[start + 1]
        elif protocol == _FRAGMENT:
            piece = _u16(ip, start + 2)
            offset, more, number = piece >> 3, bool(piece & 1), int.from_bytes(ip[start + 4 : start + 8], "big")
            protocol, start = ip[start], start + 8
            if offset:
                break
        else:
            break
    return protocol, start, offset, more, number


# -- where the application's bytes begin


def raw_start(ip: bytes, *, quoted: bool = False) -> int | None:
    """Where Raw begins in an IPv4 packet, None where there is none. Raw runs to the end of ``ip``, the bytes behind the
    IP total length included. ``quoted``: the packet is the head that an ICMP error carries."""
    size = max((ip[0] & 15) * 4, 20)
    total = _u16(ip, 2) - (ip[0] & 15) * 4
    body = ip[size:] if total < 0 else ip[size : size + total]  # offloading cards leave the length 0
    if not body:
        return None
    if _u16(ip, 6) & 0x1FFF:
        return size
    found = _raw_in_transport(ip[9], body, quoted)
    return None if found is None else size + found


def _raw_in_transport(protocol: int, body: bytes, quoted: bool) -> int | None:
    if protocol == _TCP:
        if quoted and len(body) == 8:  # what routers quote at least: ports and sequence number
            return None
        return _after(20 + max((body[12] >> 4) * 4 - 20, 0), body) if len(body) >= 20 else 0
    if protocol == _UDP:
        return _raw_in_udp(body, quoted) if len(body) >= 8 else 0
    if protocol == _ICMP:
        return _raw_in_icmp(body, quoted)
    if protocol == _IPIP and len(body) >= 20:
        return raw_start(body)
    return 0


def _after(start: int, body: bytes) -> int | None:
    return start if start < len(body) else None


def _raw_in_icmp(body: bytes, quoted: bool) -> int | None:
    size = _ICMP_SIZE.get(body[0], 8)
    if len(body) < size:
        return 0
    if body[0] in _ICMP_ERRORS and not quoted and len(body) >= 28:
        inner = raw_start(body[8:], quoted=True)
        return None if inner is None else 8 + inner
    return _after(size, body)


def _raw_in_udp(body: bytes, quoted: bool) -> int | None:
    data = body[8:][: _u16(body, 4) - 8]
    if not data:
        return None
    ports = {_u16(body, 0), _u16(body, 2)}
    found: int | None = 0
    if quoted:  # what an ICMP error quotes is not looked into
        return 8
    if ports & {53, 5353}:
        found = _raw_in_dns(data)
    elif 123 in ports and len(data) >= 48 and 1 <= data[0] & 7 <= 5:
        found = None  # NTP with what may follow it
    elif (_u16(body, 0), _u16(body, 2)) in _BOOTP_PORTS and len(data) >= _BOOTP_SIZE:
        found = None  # BOOTP, or DHCP in its options, which take all the rest
    return None if found is None else 8 + found


def _raw_in_dns(data: bytes) -> int | None:
    """Behind the header, the questions and the records; a question or record that is cut off is Raw from its start."""
    if len(data) < 12:
        return 0
    position = 12
    questions, *records = (_u16(data, at) for at in (4, 6, 8, 10))
    for count, fixed in ((questions, 4), (sum(records), 10)):
        for _ in range(count):
            if position >= len(data):
                return None
            end = _after_name(data, position)
            if end + fixed > len(data):
                return position
            end += fixed
            if fixed == 10:
                end += _u16(data, end - 2)
                if end > len(data):
                    return position
            position = end
    return _after(position, data)


def _after_name(data: bytes, position: int) -> int:
    """Behind a domain name: labels up to an empty one, or up to a pointer, which any of a length's top bits marks."""
    while position < len(data):
        length = data[position]
        if length & 0xC0:
            return position + 2 if position + 1 < len(data) else len(data)
        position += 1 + length
        if length == 0:
            break
    return min(position, len(data))
