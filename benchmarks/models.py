"""Image backbones: images a second, peak memory and the share of the scan, against the reference scan and timm's.

    python benchmarks/models.py                                        # CPU, 2 threads, 224 px, batch 1 and 8
    python benchmarks/models.py --device cuda --dtype bfloat16 --batch 64
    python benchmarks/models.py --models vim_tiny vmamba_tiny --batch 1 --json benchmarks/results/models.json

Every model of one batch size is timed in turn, ``--repeat`` rounds, so that a noisy machine disturbs all alike; the
figure is the best round's, and the spread is the median's distance from it. Before anything is timed the model must
agree with itself on the reference operators (relative error below 1e-3 in float32); that reference run is also the
peer "reference scan". timm's peers run in the same rounds. The share of the scan is the time inside the scan and short
convolution operators (gates included) of one profiled forward pass. Memory is the growth of a new process's peak over
what it holds once the model is built (CPU), or the peak that the allocator reports (CUDA). ``--json`` adds to a file
that holds other models or batch sizes already, so that a long run can be made in pieces; each piece has its own peers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import zoo
import zoo_kernels
from zoo.layers import bands
from zoo.layers.ss2d import DepthwiseConv2d

OURS = ["vim_tiny", "vmamba_tiny", "mambavision_tiny", "efficientvim_m1"]
PEERS = ["convnext_tiny", "deit_small_patch16_224", "mambaout_tiny"]
REFERENCE = " (reference scan)"
SCANS = (
    "zoo_kernels::selective_scan",
    "zoo_kernels::causal_conv1d",
    "zoo_kernels::ssd",
    "zoo_kernels::linear_scan",
    "scan convolution",
)


def build(name: str, size: int, device: str, dtype: torch.dtype, *, ours: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    if not ours:
        model = timm.create_model(name)
    else:
        fixed = {"img_size": size} if name.startswith("vim_") and size != 224 else {}
        model = zoo.create(name, **fixed)
    return model.to(device, dtype).eval()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def scan_share(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Time in scan and short-convolution operators over the time of the whole forward pass."""
    cuda = x.device.type == "cuda"
    handles = []
    for module in model.modules() if cuda else ():
        if isinstance(module, DepthwiseConv2d):  # the convolution in front of a 2D scan is an ordinary one
            handles += _labelled(module)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.inference_mode(), contextlib.nullcontext() if cuda else _labelled_bands():
        model(x)
        with profile(activities=activities) as found, record_function("whole forward"):
            model(x)
            synchronise(x.device.type)
    for handle in handles:
        handle.remove()
    time_of = (lambda e: e.device_time_total) if cuda else (lambda e: e.cpu_time_total)
    events = found.key_averages()
    whole = sum(time_of(e) for e in events if e.key == "whole forward")
    inside = sum(time_of(e) for e in events if e.key.startswith(SCANS))
    return inside / whole if whole else float("nan")


@contextlib.contextmanager
def _labelled_bands() -> Iterator[None]:
    """On a CPU the convolution in front of a 2D scan is part of a pass by bands, which a hook would switch off."""
    convolve = bands.convolve

    def labelled(conv: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        with record_function("scan convolution") if isinstance(conv, DepthwiseConv2d) else contextlib.nullcontext():
            return convolve(conv, *args, **kwargs)

    bands.convolve = labelled
    try:
        yield
    finally:
        bands.convolve = convolve


def _labelled(module: torch.nn.Module) -> list[Any]:
    stack: list[Any] = []

    def before(*_: Any) -> None:
        stack.append(record_function("scan convolution"))
        stack[-1].__enter__()

    def after(*_: Any) -> None:
        stack.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def has_scan(model: torch.nn.Module) -> bool:
    return any(name.endswith(("A_log", "Alogs")) for name, _ in model.named_parameters())


def memory(name: str, batch: int, options: argparse.Namespace, *, ours: bool, reference: bool = False) -> float:
    """Megabytes that one forward pass adds to a process holding the model, measured in a new process (CPU)."""
    words = [sys.executable, __file__, "--memory-child", name, "--batch", str(batch), "--size", str(options.size)]
    words += ["--threads", str(options.threads), "--dtype", options.dtype] + (["--ours"] if ours else [])
    words += ["--reference-child"] if reference else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def memory_child(options: argparse.Namespace) -> None:
    model = build(options.memory_child, options.size, "cpu", getattr(torch, options.dtype), ours=options.ours)
    x = torch.randn(options.batch[0], 3, options.size, options.size, dtype=getattr(torch, options.dtype))
    with torch.inference_mode(), zoo_kernels.backend("reference" if options.reference_child else "auto"):
        if not options.reference_child:  # it is slow, and what its small operators set up is small
            model(x[:1, :, : min(options.size, 224), : min(options.size, 224)])  # libraries and their buffers
        _give_back()
        before = _resident()
        _reset_peak()
        model(x)
    print(max(_peak() - before, 0.0))


def _status(field: str) -> float:
    """Megabytes from Linux' own account of this process; not a number elsewhere."""
    if not Path("/proc/self/status").exists():
        return float("nan")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    return float("nan")


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _give_back() -> None:
    """Return freed memory to the system, so that the next pass has to ask for all that it needs (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak cannot be reset here; it includes the first pass", file=sys.stderr)


def measure(batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    x = torch.randn(batch, 3, options.size, options.size, device=device, dtype=dtype)
    models: dict[str, torch.nn.Module] = {}
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in [*options.models, *options.peers]:
        ours = name in options.models
        model = build(name, options.size, device, dtype, ours=ours)
        models[name] = model
        calls[name] = lambda model=model: model(x)
        facts[name] = {"params": sum(p.numel() for p in model.parameters())}
        if not (ours and has_scan(model)):
            continue
        with torch.inference_mode():
            fast = model(x[:1])
            with zoo_kernels.backend("reference"):
                slow = model(x[:1])
        error = ((fast - slow).abs().max() / slow.abs().max()).item()
        allowed = 1e-3 if dtype == torch.float32 else 5e-2
        if not error < allowed:
            raise SystemExit(f"{name} differs from the reference by {error:.1e} (allowed {allowed:.0e}): not timed")
        facts[name] |= {"error": error, "scan_share": scan_share(model, x)}
        if not options.no_reference:

            def reference(model: torch.nn.Module = model) -> Any:
                with zoo_kernels.backend("reference"):
                    return model(x)

            calls[name + REFERENCE] = reference
            facts[name + REFERENCE] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for name, call in calls.items():
            if "reference" not in name:
                call()
        for round_ in range(options.repeat):
            for name, call in calls.items():
                if "reference" in name and round_ > 0:
                    continue  # tens of times slower: once is enough to know its place
                times[name].append(seconds(call, device))
    rows = []
    for name, found in times.items():
        best = min(found)
        row = {"model": name, "batch": batch, "images_per_second": batch / best, "milliseconds": 1e3 * best}
        row |= {"spread": statistics.median(found) / best - 1} | facts[name]
        if not options.no_memory:
            plain = name.removesuffix(REFERENCE)
            row["peak_mb"] = _cuda_peak(calls[name]) if device != "cpu" else memory(
                plain, batch, options, ours=plain in options.models, reference=plain != name
            )  # fmt: skip
        rows.append(row)
    return rows


def _cuda_peak(call: Callable[[], Any]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def machine(options: argparse.Namespace) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = found[0] if found else name
    if options.device != "cpu":
        name = torch.cuda.get_device_name()
    facts = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__}
    return facts | {"dtype": options.dtype, "size": options.size}


def show(rows: list[dict[str, Any]], peer: str) -> None:
    base = {row["batch"]: row["images_per_second"] for row in rows if row["model"] == peer}
    titles = f"{'model':38s} {'batch':>5s} {'img/s':>8s} {'ms':>8s} {'spread':>7s} {'x ' + peer:>16s}"
    print(f"{titles} {'scan':>6s} {'MB':>7s}")
    for row in rows:
        ratio = row["images_per_second"] / base[row["batch"]] if row["batch"] in base else float("nan")
        share = f"{row['scan_share']:.0%}" if "scan_share" in row else ""
        peak = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        print(
            f"{row['model']:38s} {row['batch']:5d} {row['images_per_second']:8.2f} {row['milliseconds']:8.1f} "
            f"{row['spread']:7.0%} {ratio:16.2f} {share:>6s} {peak:>7s}"
        )


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add this run to the file. A run stays whole: its rows are comparable with each other."""
    old = json.loads(path.read_text()) if path.exists() else {}
    if old and old["machine"] != about:
        raise SystemExit(f"{path} holds results of another machine or setting: {old['machine']}; give another file")
    command = "python benchmarks/models.py " + " ".join(sys.argv[1:])
    runs = [run for run in old.get("runs", []) if run["command"] != command]
    runs.append({"command": command, "rows": rows})
    path.write_text(json.dumps({"machine": about, "runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=OURS)
    parser.add_argument("--peers", nargs="*", default=PEERS, help="timm's names; the first is the unit of the ratios")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--no-reference", action="store_true", help="leave out the runs with the reference scan")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reference-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_child:
        memory_child(options)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: not measured")
    about = machine(options)
    print("  ".join(f"{k} {v}" for k, v in about.items()))
    rows = [row for batch in options.batch for row in measure(batch, options)]
    show(rows, options.peers[0] if options.peers else "")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write(options.json, about, rows)


if __name__ == "__main__":
    main()
