"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory and the instructions of the hot
loop.

    python benchmarks/gpu_compile_report.py                      # all operators, sm_80 and sm_90, bfloat16
    python benchmarks/gpu_compile_report.py selective_scan --dtype float32 --capability 90

Sizes are those of published models. The counts are of the whole kernel as ptxas made it, per instruction kind; nothing
here is a time: those need a device (kernels_gpu.py).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from zoo_kernels import _gpu, _gpu_compile, _ops

RESULTS = Path(__file__).parent / "results"
SHOWN = ("MUFU", "FFMA", "FMUL", "FADD", "HMMA", "HGMMA", "LDG", "STG", "LDS", "STS", "SHFL", "BAR", "LDL", "STL")


def sizes(dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Operator: the module that defines it, and its canonical arguments at the sizes of a published model."""

    def r(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    f32, c64 = torch.float32, torch.complex64
    L = 256
    return {
        # Mamba 130M: 1536 channels, 16 states
        "selective_scan": ("selective_scan", lambda: (
            r(1, L, 1, 1536), r(1, L, 1, 1536), r(1, 1536, 16, kind=f32), r(1, L, 1, 1, 16), r(1, L, 1, 1, 16), r(1,
            1536), r(1, L, 1536), r(1, 1536), True, None, [False], None, False, None, None, None)),
        "selective_scan_step": ("selective_scan.step", lambda: (
            r(1, 1536), r(1, 1536), r(1536, 16, kind=f32), r(1, 1, 16), r(1, 1, 16), r(1536), r(1, 1536), r(1536),
            r(1, 1536, 16, kind=f32), True)),
        "causal_conv1d": ("causal_conv1d", lambda: (
            r(1, L, 1536), r(1536, 4), r(1536), True, None, [False], None, False, None, None)),
        "causal_conv1d_step": ("causal_conv1d.step", lambda: (r(1, 1536), r(1536, 4), r(1536), r(1, 4, 1536, kind=f32),
        True)),
        # Mamba-2 130M: 24 heads of 64, 128 states
        "ssd_core": ("ssd", lambda: (
            r(1, L, 24, 64), r(1, L, 24, kind=f32), r(1, L, 24, kind=f32), r(1, L, 1, 128), r(1, L, 1, 128),
            r(24, kind=f32), None, None, None, False)),
        "ssd_step": ("ssd", lambda: (
            r(1, 24, 64), r(1, 24), r(24, kind=f32), r(1, 1, 128), r(1, 1, 128), r(24), r(1, 24, 64), r(24), None,
            r(1, 24, 64, 128, kind=f32), True, 0.0, float("inf"))),
        # Mamba-3: 32 heads of 64, 128 states, 32 angles, SISO; xLSTM: 4 heads, keys of 256; GLA: 4 heads, keys of 128
        "mamba3_step": ("mamba3_scan", lambda: (
            r(1, 32, 64), r(1, 32), r(1, 32), r(1, 1, 1, 128), r(1, 1, 1, 128), r(1, 32), r(1, 32), r(32), r(1, 32, 64),
            r(32, 1, 128), r(32, 1, 128), None, None, None, r(1, 32, 32, kind=f32), r(1, 32, 64, 128, kind=f32),
            r(1, 1, 32, 128, kind=f32), r(1, 32, 64, kind=f32), False, True)),
        "mlstm_step": ("mlstm", lambda: (
            r(1, 4, 256), r(1, 4, 256), r(1, 4, 512), r(1, 4), r(1, 4), r(1, 4, 512, 256, kind=f32),
            r(1, 4, 256, kind=f32), r(1, 4, kind=f32), 0.0625, 1e-6)),
        "linear_attention_step": ("linear_attention", lambda: (
            r(1, 4, 256), r(1, 4, 128), r(1, 4, 128), r(1, 4, 128), r(1, 4, 256, 128, kind=f32),
            r(1, 4, 128, kind=f32), 1.0, False, 1e-6)),
        "rms_norm": ("rms_norm", lambda: (r(L, 1536), r(L, 1536), r(1536), None, 1e-5, 1, False, False)),
        "linear_scan": ("linear_scan", lambda: (r(1, L, 1024), r(1, L, 1024), None, False, None, False, None, None)),
        "linear_scan (complex)": ("linear_scan", lambda: (
            r(1, L, 256, kind=c64), r(1, L, 256, kind=c64), None, False, None, False, None, None)),
        "linear_attention_gated": ("linear_attention", lambda: (
            r(1, L, 4, 128), r(1, L, 4, 64), r(1, L, 4, 64), r(1, L, 4, 64), None, None, None, False)),
        "slstm": ("slstm", lambda: (r(1, L, 4, 4, 128), r(4, 128, 4, 128), r(4, 4, 128), None, None, None)),
        "cauchy": ("cauchy", lambda: (
            r(1, 256, 32, kind=c64), r(256, 32, kind=c64), r(513, kind=c64), r(513, kind=c64))),
        "linear": ("linear", lambda: (r(1, 768), r(3072, 768), None, None)),
    }  # fmt: skip


def report(name: str, folder: str, arguments: tuple[Any, ...], capability: int) -> list[dict[str, Any]]:
    """One record for each kernel that forward and backward of the operator launch."""
    importlib.import_module(f"zoo_kernels.ops.{folder}")
    operator = _ops.OPERATORS[name.split(" ")[0]]
    module = operator.module("triton")
    if isinstance(module, str):
        return [{"operator": name, "reason": module}]
    hopper = mock.patch.object(_gpu, "warpgroups", return_value=capability == 90)  # which decides the tiles there
    with hopper, _gpu_compile.recorded() as launches:
        result = module.forward(*arguments, save=True)
        result = result if isinstance(result, tuple) else (result,)
        if hasattr(module, "backward"):
            count = len(operator.outputs)
            needs = [True] * len(operator.differentiable)
            module.backward([t.clone() for t in result[:count]], arguments, result[count:], needs)
    records = []
    for launch in launches:
        found = _gpu_compile.resources(_gpu_compile.compiled(launch, capability))
        mode = [key for key, value in launch.meta.items() if value is True]
        record = {"operator": name, "kernel": launch.name, "modes": mode, "sm": capability}
        records.append(record | {"warps": launch.meta.get("num_warps", 4)} | found)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="operators to report on; all if none is named")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--capability", type=int, action="append", help="80, 90, ...; may be given more than once")
    parser.add_argument("--json", action="store_true", help=f"also write {RESULTS.name}/gpu_compile_report.json")
    options = parser.parse_args(argv)
    cases = sizes(getattr(torch, options.dtype))
    unknown = [name for name in options.operators if name not in cases]
    if unknown:
        parser.error(f"no such operator: {', '.join(unknown)}; there are {', '.join(cases)}")
    records = []
    write = sys.stdout.write
    write(f"{'operator':24}{'kernel':26}{'sm':>4}{'warps':>6}{'regs':>6}{'spill':>7}{'shared':>8}  instructions\n")
    for name in options.operators or cases:
        folder, build = cases[name]
        for capability in options.capability or (80, 90):
            for record in report(name, folder, build(), capability):
                records.append(record)
                if "reason" in record:
                    write(f"{name:24}{record['reason']}\n")
                    continue
                counts = record["operations"]
                shown = " ".join(f"{kind} {counts[kind]}" for kind in SHOWN if kind in counts)
                write(
                    f"{name:24}{record['kernel']:26}{record['sm']:>4}{record['warps']:>6}{record['registers']:>6}"
                    f"{record['spilled']:>7}{record['shared']:>8}  {shown}\n"
                )
    if options.json:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu_compile_report.json").write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
