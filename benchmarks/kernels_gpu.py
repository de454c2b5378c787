"""The Triton kernels on a GPU: checked against the reference, then timed against the limit of the device and against
peers.

    python benchmarks/kernels_gpu.py                        # all operators, bfloat16
    python benchmarks/kernels_gpu.py selective_scan ssd --dtype float32 --repeat 50
    python benchmarks/kernels_gpu.py --limits "NVIDIA H100 SXM"     # the limits alone; needs no device
    TRITON_INTERPRET=1 python benchmarks/kernels_gpu.py --smoke     # the whole script at toy sizes on a CPU; no times

Peers are timed in the same run where they import: mamba_ssm (its CUDA and Triton kernels), causal_conv1d and fla. The
limit of a call is the larger of its bytes over the bandwidth that a large copy reaches here, and its exponentials over
the rate of the special-function units (16 a clock and multiprocessor on sm_80 and sm_90), and its matrix products over
the tensor cores. Times are medians of CUDA events. Results go to benchmarks/results/kernels_gpu_<device>.json. Without
a device the results are: not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo_kernels

RESULTS = Path(__file__).parent / "results"
Tensors = dict[str, Tensor]


class Device(NamedTuple):
    """bytes / s, exponentials / s, dense bfloat16 multiply-adds / s."""

    bandwidth: float
    exponentials: float
    products: float


# Data sheets: bandwidth, multiprocessors * boost clock * 16, dense bfloat16 FLOP/s / 2.
DATA_SHEETS = {
    "NVIDIA H100 SXM": Device(3.35e12, 132 * 1.83e9 * 16, 989e12 / 2),
    "NVIDIA A100 80GB": Device(2.04e12, 108 * 1.41e9 * 16, 312e12 / 2),
}


class Case(NamedTuple):
    """An operator at one size: its inputs, the call, its peers by name, and what a forward call must move and
    compute."""

    tensors: Tensors
    call: Callable[[Tensors], Tensor]
    peers: dict[str, Callable[[Tensors], Tensor]]
    bytes: float
    exponentials: float = 0.0
    products: float = 0.0


def _module(name: str) -> Any:
    """A peer's module, or None where it is not installed or does not import here."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail in any way on this combination of versions: say so and go on
        sys.stderr.write(f"peer {name} is left out: {type(error).__name__}: {error}\n")
        return None


def selective_scan(dtype: torch.dtype, device: str, toy: bool) -> Case:
    b, L, C, N = (1, 70, 6, 4) if toy else (8, 2048, 1536, 16)
    t = {
        "u": torch.randn(b, L, C), "dt": torch.randn(b, L, C), "A": -torch.rand(C, N) - 0.1, "B": torch.randn(b, L, N),
        "C": torch.randn(b, L, N), "D": torch.randn(C), "z": torch.randn(b, L, C), "dt_bias": torch.randn(C),
    }  # fmt: skip
    t = {name: v.to(device, torch.float32 if name in ("A", "D", "dt_bias") else dtype) for name, v in t.items()}
    peers: dict[str, Callable[[Tensors], Tensor]] = {}
    theirs = None if toy or device != "cuda" else _module("mamba_ssm.ops.selective_scan_interface")
    if theirs is not None:

        def mamba_ssm(t: Tensors) -> Tensor:
            u, dt, z, B, C_ = (t[name].transpose(1, 2) for name in ("u", "dt", "z", "B", "C"))
            y = theirs.selective_scan_fn(u, dt, t["A"], B, C_, t["D"], z, t["dt_bias"], True)
            return y.transpose(1, 2)

        peers["mamba_ssm (CUDA)"] = mamba_ssm
    size = dtype.itemsize
    return Case(
        t, lambda t: zoo_kernels.selective_scan(**t, dt_softplus=True)[0], peers, b * L * (4 * C + 2 * N) * size,
        b * L * C * (N + 2),
    )  # fmt: skip


def selective_scan_paths(dtype: torch.dtype, device: str, toy: bool) -> Case:
    """Four paths over images, as in VMamba's first stage."""
    b, side, C, N, K = (1, 5, 4, 1, 4) if toy else (64, 56, 192, 1, 4)
    L = side * side
    rows = torch.arange(L)
    columns = rows.view(side, side).t().flatten()
    path = torch.stack([rows, columns, rows, columns]).to(device)
    t = {
        "u": torch.randn(b, L, C), "dt": torch.randn(b, L, K, C), "A": -torch.rand(K, C, N) - 0.1, "B": torch.randn(b,
        L, K, N), "C": torch.randn(b, L, K, N), "D": torch.randn(K, C), "dt_bias": torch.randn(K, C),
    }  # fmt: skip
    t = {name: v.to(device, torch.float32 if name in ("A", "D", "dt_bias") else dtype) for name, v in t.items()}
    flags = [False, False, True, True]
    orders = [p.flip(0) if flag else p for p, flag in zip(path, flags, strict=True)]
    back = [torch.argsort(order) for order in orders]

    def call(t: Tensors) -> Tensor:
        return zoo_kernels.selective_scan(**t, dt_softplus=True, path=path, reverse=flags)[0]

    def crossed(t: Tensors) -> Tensor:
        """The published pipeline: every input copied in each order, four plain scans, every output copied back."""
        total = torch.zeros_like(t["u"])
        for k in range(K):
            part = {name: t[name][:, orders[k], k].contiguous() for name in ("dt", "B", "C")}
            part |= {name: t[name][k] for name in ("A", "D", "dt_bias")}
            y, _ = zoo_kernels.selective_scan(t["u"][:, orders[k]].contiguous(), **part, dt_softplus=True)
            total = total + y[:, back[k]]
        return total

    size = dtype.itemsize
    return Case(
        t, call, {"four copies in and out, same kernel": crossed}, b * L * ((K + 2) * C + 2 * K * N) * size,
        b * L * K * C * (N + 1),
    )  # fmt: skip


def ssd(dtype: torch.dtype, device: str, toy: bool) -> Case:
    b, L, H, P, N = (1, 70, 2, 4, 5) if toy else (8, 2048, 24, 64, 128)
    t = {
        "x": torch.randn(b, L, H, P), "dt": torch.randn(b, L, H), "A": -torch.rand(H) - 0.1, "B": torch.randn(b, L, 1,
        N), "C": torch.randn(b, L, 1, N), "D": torch.randn(H), "dt_bias": torch.randn(H),
    }  # fmt: skip
    t = {name: v.to(device, torch.float32 if name in ("A", "D", "dt_bias") else dtype) for name, v in t.items()}
    peers: dict[str, Callable[[Tensors], Tensor]] = {}
    theirs = None if toy or device != "cuda" else _module("mamba_ssm.ops.triton.ssd_combined")
    if theirs is not None:
        peers["mamba_ssm (Triton)"] = lambda t: theirs.mamba_chunk_scan_combined(
            t["x"], t["dt"], t["A"], t["B"], t["C"], 256, t["D"], dt_bias=t["dt_bias"], dt_softplus=True
        )
    fla = None if toy or device != "cuda" else _module("fla.ops.simple_gla")
    if fla is not None:

        def simple_gla(t: Tensors) -> Tensor:
            d = F.softplus(t["dt"].float() + t["dt_bias"])
            q, k = (t[name].expand(-1, -1, H, -1) for name in ("C", "B"))
            y, _ = fla.chunk_simple_gla(q, k, (t["x"] * d[..., None]).to(t["x"].dtype), d * t["A"], scale=1.0)
            return y + t["D"][:, None] * t["x"]

        peers["fla (Triton)"] = simple_gla
    chunk = 64
    products = b * L * H * (chunk * N + chunk * P + 2 * P * N)
    return Case(
        t, lambda t: zoo_kernels.ssd(**t, dt_softplus=True)[0], peers, b * L * (2 * H * P + 2 * N + H) * dtype.itemsize,
        b * L * H * chunk, products,
    )  # fmt: skip


def causal_conv1d(dtype: torch.dtype, device: str, toy: bool) -> Case:
    b, L, C, W = (1, 20, 6, 4) if toy else (8, 2048, 1536, 4)
    t = {"x": torch.randn(b, L, C), "weight": torch.randn(C, W), "bias": torch.randn(C)}
    t = {name: v.to(device, dtype) for name, v in t.items()}
    theirs = None if toy or device != "cuda" else _module("causal_conv1d")
    peers: dict[str, Callable[[Tensors], Tensor]] = {}
    if theirs is not None:
        peers["causal_conv1d (CUDA)"] = lambda t: theirs.causal_conv1d_fn(
            t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu"
        ).transpose(1, 2)
    return Case(
        t,
        lambda t: zoo_kernels.causal_conv1d(**t, activation="silu")[0],
        peers,
        2 * b * L * C * dtype.itemsize,
        b * L * C,
    )


def gated_rms_norm(dtype: torch.dtype, device: str, toy: bool) -> Case:
    rows, dim = (5, 12) if toy else (16384, 1536)
    t = {"x": torch.randn(rows, dim), "z": torch.randn(rows, dim), "weight": torch.randn(dim)}
    t = {name: v.to(device, dtype) for name, v in t.items()}
    theirs = None if toy or device != "cuda" else _module("mamba_ssm.ops.triton.layernorm_gated")
    peers: dict[str, Callable[[Tensors], Tensor]] = {}
    if theirs is not None:
        peers["mamba_ssm (Triton)"] = lambda t: theirs.rmsnorm_fn(
            t["x"], t["weight"], None, z=t["z"], norm_before_gate=False
        )
    return Case(t, lambda t: zoo_kernels.gated_rms_norm(**t), peers, 3 * rows * dim * dtype.itemsize, rows * dim)


def linear_scan(dtype: torch.dtype, device: str, toy: bool) -> Case:
    b, L, C = (1, 70, 3) if toy else (8, 2048, 2048)
    t = {"x": torch.randn(b, L, C), "a": torch.rand(b, L, C)}
    t = {name: v.to(device, dtype) for name, v in t.items()}
    fla = None if toy or device != "cuda" else _module("fla.ops.hgrn")
    peers: dict[str, Callable[[Tensors], Tensor]] = {}
    if fla is not None:
        peers["fla hgrn (Triton)"] = lambda t: fla.fused_recurrent_hgrn(t["x"], t["a"].log())[0]
    return Case(t, lambda t: zoo_kernels.linear_scan(**t)[0], peers, 3 * b * L * C * dtype.itemsize)


CASES: dict[str, Callable[[torch.dtype, str, bool], Case]] = {
    "selective_scan": selective_scan, "selective_scan_paths": selective_scan_paths, "ssd": ssd,
    "causal_conv1d": causal_conv1d, "gated_rms_norm": gated_rms_norm, "linear_scan": linear_scan,
}  # fmt: skip


def limit(case: Case, device: Device) -> tuple[float, str]:
    """Seconds that a forward call takes at least, and what bounds it."""
    floors = {
        "bytes": case.bytes / device.bandwidth, "exponentials": case.exponentials / device.exponentials,
        "products": case.products / device.products,
    }  # fmt: skip
    bound = max(floors, key=lambda name: floors[name])
    return floors[bound], bound


def measured_device() -> Device:
    """Bandwidth of a large copy; multiprocessors and clock as the driver states them; tensor cores by a large
    product."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), 20)
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    products = 8192**3 / seconds(lambda: left @ left, 20)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or torch.cuda.clock_rate() * 1e6
    return Device(bandwidth, properties.multi_processor_count * clock * 16, products)


def seconds(work: Callable[[], Any], repeat: int) -> float:
    """Median time of a call by CUDA events."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def verified(build: Callable[[torch.dtype, str, bool], Case], dtype: torch.dtype, device: str) -> float:
    """Largest difference of outputs and gradients from the float64 reference at a small size; raises if too large."""
    torch.manual_seed(0)
    case = build(dtype, device, True)
    results = []
    for kind, name in ((torch.float64, "reference"), (None, "triton")):
        t = {key: (v if kind is None else v.to(kind)).detach().requires_grad_() for key, v in case.tensors.items()}
        with zoo_kernels.backend(name):
            y = case.call(t)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).to(y.dtype)
            results.append([y, *torch.autograd.grad(y, list(t.values()), g)])
    worst = 0.0
    for want, got in zip(*results, strict=True):
        worst = max(worst, float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-6)))
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    if not worst <= tolerance:
        raise SystemExit(f"{build.__name__}: off by {worst:.1e} from the reference; at most {tolerance:.0e} is right")
    return worst


def timed(name: str, dtype: torch.dtype, device: Device, repeat: int) -> dict[str, Any]:
    case = CASES[name](dtype, "cuda", False)
    least, bound = limit(case, device)

    def both(call: Callable[[Tensors], Tensor]) -> tuple[float, float, float]:
        t = {key: v.detach().requires_grad_() for key, v in case.tensors.items()}
        with torch.no_grad():
            forward = seconds(lambda: call(t), repeat)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call(t)
        g = torch.randn_like(y)
        everything = seconds(lambda: torch.autograd.grad(call(t), list(t.values()), g, allow_unused=True), repeat)
        return forward, everything, float(torch.cuda.max_memory_allocated() - before)

    forward, everything, memory = both(case.call)
    record: dict[str, Any] = {
        "operator": name, "dtype": str(dtype).removeprefix("torch."), "forward_s": forward, "forward_backward_s":
        everything, "memory": memory, "limit_s": least, "bound": bound, "share_of_limit": least / forward, "peers": {},
    }  # fmt: skip
    for peer, call in case.peers.items():
        try:
            theirs = both(call)
        except Exception as error:  # a peer may refuse this device or these versions: say so and go on
            sys.stderr.write(f"{peer} is left out: {type(error).__name__}: {error}\n")
            continue
        record["peers"][peer] = {
            "forward": theirs[0] / forward,
            "forward_backward": theirs[1] / everything,
            "memory": memory / theirs[2],
        }
    return record


def save(device: Device, records: list[dict[str, Any]]) -> None:
    import triton

    RESULTS.mkdir(exist_ok=True)
    name = torch.cuda.get_device_name(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = {
        "device": name, "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__, "triton": triton.__version__, "limits": device._asdict(), "records": records,
    }  # fmt: skip
    label = name.replace(" ", "_").replace("/", "_")
    (RESULTS / f"kernels_gpu_{label}.json").write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=30, help="timed calls; the median counts")
    parser.add_argument("--limits", choices=sorted(DATA_SHEETS), help="print the limits on this device and stop")
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes, checked, not timed; on a CPU: TRITON_INTERPRET=1"
    )
    options = parser.parse_args(argv)
    unknown = [name for name in options.operators if name not in CASES]
    if unknown:
        parser.error(f"no such operator: {', '.join(unknown)}; there are {', '.join(CASES)}")
    names, dtype, write = options.operators or list(CASES), getattr(torch, options.dtype), sys.stdout.write
    if options.limits:
        for name in names:
            least, bound = limit(CASES[name](dtype, "meta", False), DATA_SHEETS[options.limits])
            write(f"{name:24}{least * 1e6:10.1f} us  bound by {bound}\n")
        return 0
    place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cpu" and not options.smoke:
        write("no CUDA device: not measured (--smoke with TRITON_INTERPRET=1 checks the script, --limits the model)\n")
        return 1
    errors = {name: verified(CASES[name], dtype, place) for name in names}
    for name, error in errors.items():
        write(f"{name:24}agrees with the float64 reference to {error:.1e}\n")
    sys.stdout.flush()
    if options.smoke:
        return 0
    device, records = measured_device(), []
    write(
        f"{torch.cuda.get_device_name(0)}: {device.bandwidth / 1e12:.2f} TB/s, "
        f"{device.exponentials / 1e12:.2f} T exponentials/s\n"
    )
    for name in names:
        record = timed(name, dtype, device, options.repeat) | {"error": errors[name]}
        records.append(record)
        save(device, records)  # after each, so that a run that is cut off has not been for nothing
        write(
            f"{name:24}forward {record['forward_s'] * 1e6:9.1f} us, {record['share_of_limit']:.0%} of the limit "
            f"({record['bound']}); with backward {record['forward_backward_s'] * 1e6:9.1f} us\n"
        )
        for peer, ratio in record["peers"].items():
            write(
                f"    {peer}: forward {ratio['forward']:.2f}x, with backward {ratio['forward_backward']:.2f}x as long; "
                f"we take {ratio['memory']:.2f} of its memory\n"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
