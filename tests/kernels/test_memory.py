"""Large new tensors: ordinary ones, whose memory Linux was asked to give in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from zoo_kernels._memory import LARGE, empty, reusing


def flags(address: int) -> list[str]:
    """Linux' flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (9, LARGE // 8 + 3)])
def test_tensors_are_ordinary(shape, dtype) -> None:
    x = empty(*shape, dtype=dtype)
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert (x.fill_(2).double().sum() == 2 * x.numel()).item()


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="the operating system has no transparent huge pages",
)
def test_large_ones_ask_for_huge_pages() -> None:
    assert "hg" in flags(empty(8 * LARGE, dtype=torch.float32).data_ptr() + LARGE)
    plain = mmap.mmap(-1, 4 * LARGE)  # straight from the system: torch's may lie where a huge one has lain
    assert "hg" not in flags(ctypes.addressof(ctypes.c_char.from_buffer(plain)) + LARGE)


def test_memory_that_is_left_is_used_again() -> None:
    rows = LARGE // 1024

    def new(n: int = rows) -> torch.Tensor:
        return empty(n, 512, dtype=torch.float32)

    with reusing():
        x = new()
        place, part = x.data_ptr(), x.view(512, rows)[3:].t()
        del x
        assert new().data_ptr() != place  # a view refers to it
        del part
        y = new(rows - 5)
        assert y.data_ptr() == place
        assert y.shape == (rows - 5, 512)
        assert y.is_contiguous()
        numbers = y.numpy()
        del y
        assert new().data_ptr() != place
        del numbers
        assert new(rows // 2 - 1).data_ptr() != place  # less than half of it
        with reusing():
            kept = new()
        assert kept.data_ptr() == place
    kept.fill_(1)
    later = new().fill_(2)
    assert kept.sum() == kept.numel()
    assert later.data_ptr() != place


def test_threads_share_no_memory() -> None:
    import threading

    with reusing():
        x = empty(LARGE, dtype=torch.float32)
        place = x.data_ptr()
        del x
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(empty(LARGE, dtype=torch.float32).data_ptr()))
        thread.start()
        thread.join()
        assert found != [place]
