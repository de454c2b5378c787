"""Large new tensors: ordinary ones, whose memory Linux was asked to give in huge pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from zoo_kernels._memory import LARGE, empty


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
    assert "hg" not in flags(torch.empty(8 * LARGE).data_ptr() + LARGE)
