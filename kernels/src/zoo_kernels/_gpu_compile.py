"""Compile the Triton kernels for a GPU that is not there: for tests and for the compile report.

Operators run as usual on CPU tensors, with every launch recorded instead of done; each recorded launch is then compiled
with the specialisations that its arguments would have on a device. Not for use with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _gpu

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel, its positional arguments, its compile-time arguments and options."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """In the block, launches go into the list and nothing runs: results of operators are uninitialised memory."""
    launches: list[Launch] = []
    before = _gpu.launch

    def record(kernel: Any, total: int, *args: Any, **meta: Any) -> None:
        launches.append(Launch(kernel, (*args, total), meta))

    _gpu.launch = record
    try:
        yield launches
    finally:
        _gpu.launch = before


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """What Triton compiles a launch for: types of the arguments, compile-time values, known divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    positional = iter(launch.args)
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.meta[parameter.name] if parameter.name in launch.meta else next(positional)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def compiled(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel (``asm`` holds ttir, ttgir, ptx, cubin) for compute capability 80, 90, ..."""
    signature, constants, attributes = specialisation(launch)
    options = {key: value for key, value in launch.meta.items() if key in ("num_warps", "num_stages")}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory (bytes) of a compiled kernel, and how often each kind of instruction
    occurs."""
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(kernel.asm["cubin"])
        usage = _tool(os.path.join(folder, "cuobjdump"), "-res-usage", path)
        code = _tool(os.path.join(folder, "nvdisasm"), "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code)
    registers, stack, _ = (int(v) for v in found.groups()) if found else (None, None, None)
    return {
        "registers": registers, "spilled": stack, "shared": kernel.metadata.shared, "operations":
        dict(Counter(operations)),
    }  # fmt: skip


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
