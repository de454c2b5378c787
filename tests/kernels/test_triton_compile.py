"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, with 64-bit offsets; its forward and its backward."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re

import pytest
import torch

pytest.importorskip("triton")
from zoo_kernels import _gpu, _gpu_compile, _ops, ops

# Each kernel for each target once: float32 for the older, bfloat16 for the newer.
# What a block may take on the smallest of the devices: 99 KiB on sm_86 and sm_89.
SHARED = 99 * 1024
TARGETS = ((torch.float32, 80), (torch.bfloat16, 90))


def operators() -> dict[str, _ops.Operator]:
    """Those with a Triton path, in order of name."""
    for module in pkgutil.walk_packages(ops.__path__, "zoo_kernels.ops."):
        if module.ispkg or module.name.endswith((".step", ".core")):
            importlib.import_module(module.name)
    return {
        name: operator
        for name, operator in sorted(_ops.OPERATORS.items())
        if not isinstance(operator.module("triton"), str)
    }


def launches(operator: _ops.Operator, dtype: torch.dtype) -> list[_gpu_compile.Launch]:
    """What forward and backward launch for the operator's own cases; one launch of each signature."""
    module = operator.module("triton")
    with _gpu_compile.recorded() as found:
        for case in operator.cases(torch.device("cpu"), dtype):
            result = module.forward(*case, save=True)
            result = result if isinstance(result, tuple) else (result,)
            if hasattr(module, "backward"):
                count = len(operator.outputs)
                grads = [torch.ones_like(t) for t in result[:count]]
                module.backward(grads, case, result[count:], [True] * len(operator.differentiable))
    unique = {(launch.name, repr(sorted(launch.meta.items())), signature(launch)): launch for launch in found}
    return list(unique.values())


def signature(launch: _gpu_compile.Launch) -> str:
    return ",".join(str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in launch.args)


def narrow_offsets(ttir: str) -> list[str]:
    """Offsets of pointers that are 32-bit products with an argument of the kernel: these could overflow."""
    definitions = dict(re.findall(r"^\s*(%\S+) = (.*)$", ttir, re.M))

    def is_wide_product(name: str, multiplied: bool = False) -> bool:
        source = definitions.get(name)
        if source is None:  # an argument of the kernel
            return multiplied
        multiplied = multiplied or "arith.muli" in source
        return any(
            is_wide_product(operand, multiplied) for operand in re.findall(r"%[\w.#]+", source.split(" loc(")[0])
        )

    offsets = re.findall(r"tt\.addptr %\S+, (%\S+) : [^,]+, (\S+)", ttir)
    return [f"{name} = {definitions[name]}" for name, kind in offsets if "i64" not in kind and is_wide_product(name)]


OPERATORS = operators()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_with_wide_offsets(name, monkeypatch):
    seen = 0
    for dtype, capability in TARGETS:
        monkeypatch.setattr(_gpu, "warpgroups", lambda tensor, hopper=capability == 90: hopper)
        for launch in launches(OPERATORS[name], dtype):
            kernel = _gpu_compile.compiled(launch, capability)
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= SHARED, f"{launch.name} needs {kernel.metadata.shared} bytes"
            if launch.meta.get("WIDE") is False:  # taken only where 32 bits reach every offset
                kernel = _gpu_compile.compiled(launch._replace(meta={**launch.meta, "WIDE": True}), capability)
            assert "wgmma" not in kernel.asm["ptx"], f"{launch.name}: see _gpu.warpgroups"
            narrow = narrow_offsets(kernel.asm["ttir"])
            assert not narrow, f"{launch.name} adds 32-bit products to pointers: {narrow}"
            seen += 1
    assert seen


def test_the_search_for_narrow_offsets_finds_one():
    ttir = """
    %0 = tt.splat %n : i32 -> tensor<4xi32>
    %1 = arith.muli %r, %0 : tensor<4xi32>
    %r = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32>
    %2 = tt.addptr %p, %1 : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    %3 = tt.addptr %p, %r : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    """
    assert narrow_offsets(ttir) == ["%1 = arith.muli %r, %0 : tensor<4xi32>"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
def test_a_new_length_or_batch_compiles_nothing():
    scan = OPERATORS["selective_scan"].module("triton")

    def compiled_for(batch: int, length: int) -> list[str]:
        u = torch.zeros(batch, length, 1, 48)
        B = torch.zeros(batch, length, 1, 1, 16)
        A = torch.zeros(1, 48, 16)
        args = (u, u, A, B, B, None, None, None, True, None, [False], None, False, None, None, None)
        with _gpu_compile.recorded() as found:
            y, final, borders = scan.forward(*args, save=True, split=1)
            scan.backward((y, final), args, (borders,), [True] * 9 + [False], split=1)
        return [f"{launch.name} {_gpu_compile.specialisation(launch)}" for launch in found]

    assert len({tuple(compiled_for(*shape)) for shape in ((1, 1), (2, 17), (3, 64), (16, 160), (1, 4096))}) == 1
