"""Capture files: every published form gives the same packets; damage is named."""

import struct

import pytest

from zoo_network.captures import read_capture, stream_packets, write_pcap
from zoo_registry import errors

from .packet_writer import block, ethernet, ipv4, pcap, pcapng, udp

FRAMES = [(1_700_000_000.25, ethernet(ipv4(udp(b"abc"), 17))), (1_700_000_001.5, ethernet(ipv4(udp(b"defgh"), 17)))]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["pcap", "pcap-ns", "pcapng", "pcapng-ns", "pcapng-binary", "pcapng-offset"])
def test_forms(form, order):
    data = {
        "pcap": lambda: pcap(FRAMES, order),
        "pcap-ns": lambda: pcap(FRAMES, order, nanoseconds=True),
        "pcapng": lambda: pcapng(FRAMES, order),
        "pcapng-ns": lambda: pcapng(FRAMES, order, resolution=9),
        "pcapng-binary": lambda: pcapng(FRAMES, order, resolution=0x80 | 20),
        "pcapng-offset": lambda: pcapng(FRAMES, order, offset=1_000_000_000),
    }[form]()
    found = read_capture(data)
    assert not found.notes
    assert [p.data for p in found.packets] == [d for _, d in FRAMES]
    assert [p.length for p in found.packets] == [len(d) + 7 for _, d in FRAMES]
    assert [p.time for p in found.packets] == pytest.approx([t for t, _ in FRAMES], abs=1e-5)
    assert {p.link for p in found.packets} == {1}


def test_a_file_written_is_read_again(tmp_path):
    for nanoseconds in (False, True):
        found = read_capture(write_pcap(tmp_path / "a.pcap", FRAMES, nanoseconds=nanoseconds))
        assert [(p.time, p.data) for p in found.packets] == FRAMES


def test_simple_and_unknown_blocks():
    """A simple packet has no time; blocks of other types are passed over; a second section has its own interfaces."""
    frame = FRAMES[0][1]
    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    interface = block(1, struct.pack("<HHI", 101, 0, 40))
    data = section + interface + block(5, bytes(12)) + block(3, struct.pack("<I", len(frame)) + frame[:40])
    found = read_capture(data + pcapng(FRAMES, ">"))
    assert len(found) == 3
    assert found.packets[0].data == frame[:40]
    assert found.packets[0].link == 101


@pytest.mark.parametrize("form", [pcap, pcapng])
def test_a_file_that_ends_early_gives_what_is_there(form):
    data = form(FRAMES)
    found = read_capture(data[:-9])
    assert len(found) == 1
    assert "ends within" in found.notes[0]


def test_foreign_files(tmp_path):
    (tmp_path / "a.pcap").write_bytes(b"")
    (tmp_path / "b.pcap").write_bytes(b"GIF89a...")
    (tmp_path / "c.pcap").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match=r"a\.pcap is empty"):
        read_capture(tmp_path / "a.pcap")
    with pytest.raises(ValueError, match=r"b\.pcap begins with the bytes 47 49 46 38; expected a capture"):
        read_capture(tmp_path / "b.pcap")
    with pytest.raises(ValueError, match="unpack it first"):
        read_capture(tmp_path / "c.pcap")
    with pytest.raises(ValueError, match="ends within its file header"):
        read_capture(pcap(FRAMES)[:20])


def test_damaged_files():
    data = bytearray(pcap(FRAMES))
    data[24 + 8 : 24 + 12] = b"\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match="packet 1 at byte 24 says that it has 2147483647 bytes"):
        read_capture(bytes(data))
    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    with pytest.raises(ValueError, match="an interface that was not described"):
        read_capture(section + block(6, struct.pack("<IIIII", 0, 0, 0, 4, 4) + b"abcd"))
    with pytest.raises(ValueError, match="says that it has 6 bytes"):
        read_capture(section + struct.pack("<III", 6, 6, 0))
    with pytest.raises(ValueError, match="no byte-order mark"):
        read_capture(b"\x0a\x0d\x0d\x0a" + bytes(24))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_capture(tmp_path / "none.pcap")
    with pytest.raises(errors.BadFile, match="is a folder"):
        read_capture(tmp_path)
    with pytest.raises(errors.BadFile, match="0 bytes in memory is empty"):
        read_capture(b"")


@pytest.mark.parametrize("cut", [4, 8, 11])
def test_a_section_that_is_cut_off(cut):
    """The first block must be there; a later one that is not is the end of the file."""
    with pytest.raises(ValueError, match="ends within its first block"):
        read_capture(pcapng(FRAMES)[:cut])
    found = read_capture(pcapng(FRAMES) + pcapng(FRAMES)[:cut])
    assert len(found) == 2
    assert "ends within the header of a block" in found.notes[0]


def test_packets_come_one_by_one(tmp_path):
    """The packets before a damaged place are given before it is found."""
    data = pcap(FRAMES) + struct.pack("<IIII", 0, 0, 1 << 30, 1 << 30)
    (tmp_path / "a.pcap").write_bytes(data)
    for source in (tmp_path / "a.pcap", data):
        stream = stream_packets(source, [])
        assert [next(stream).data for _ in FRAMES] == [d for _, d in FRAMES]
        with pytest.raises(errors.BadFile, match="packet 3"):
            next(stream)
