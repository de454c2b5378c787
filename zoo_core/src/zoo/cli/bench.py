"""``zoo bench``: how long a forward pass takes here. Refuses to time a result that is wrong."""

from __future__ import annotations

import statistics
import time
from typing import Any

import click

from . import output


@click.command()
@click.argument("name")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--device", help="cpu, cuda ... (default: cuda if there is one).")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--repeats", default=10, show_default=True, type=click.IntRange(min=1))
@click.option("--train", is_flag=True, help="Forward and backward.")
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Model argument; repeatable.")
@output.as_json
def bench(
    name: str,
    batch_size: int,
    device: str | None,
    dtype: str,
    repeats: int,
    train: bool,
    compiled: bool,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Time NAME on random input (weights are random too: time does not depend on them).

    The first call, which pays for kernels and caches, is reported apart. Before timing, the outputs are compared with
    the reference kernels'; a wrong result is not timed.
    """
    import torch

    import zoo
    from zoo.placement import checked_device
    from zoo.testing.cases import published
    from zoo.testing.fullsize import count
    from zoo_registry import errors

    place = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    assert place is not None
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise click.UsageError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16")
    torch.manual_seed(0)
    model = zoo.create(name, **output.pairs(settings, "--set")).to(place, kind).train(train)
    card = model.zoo_info.card
    inputs = published(card).inputs(batch_size)
    inputs = {k: v.to(place, kind if v.is_floating_point() else None) for k, v in inputs.items()}

    error = _compare(model.eval(), inputs, kind)
    allowed = 1e-3 if kind in (torch.float32, torch.float64) else 0.25
    if error > allowed:
        raise errors.BadCheckpoint(
            f"{name} differs from the reference kernels by {error:.2g} (allowed {allowed:g}), so it is not timed; "
            "`zoo doctor --kernels` finds the kernel"
        )
    model.train(train)
    runner = torch.compile(model) if compiled else model
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    first, times = _time(runner, inputs, place, repeats, train)
    facts: dict[str, Any] = {
        "model": card.name,
        "batch_size": batch_size,
        "device": _device_name(place),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "what": "forward and backward" if train else "forward",
        "compiled": compiled,
        "parameters": count(model),
        "first_ms": round(first, 3),
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "max_ms": round(max(times), 3),
        "repeats": repeats,
        "samples_per_s": round(batch_size * 1000 / statistics.median(times), 2),
        "peak_memory_bytes": _peak(place),
        "difference_from_reference": error,
    }
    if as_json:
        output.emit(facts)
    else:
        shown = facts | {
            "parameters": f"{facts['parameters']:,}",
            "peak_memory": output.size(facts["peak_memory_bytes"]),
        }
        shown.pop("peak_memory_bytes")
        for title, value in shown.items():
            click.echo(f"{click.style(f'{title:<27}', bold=True)}{value}")
    return 0


def _compare(model: Any, inputs: dict[str, Any], kind: Any) -> float:
    import torch

    import zoo_kernels
    from zoo.testing import relative_error
    from zoo.testing.cases import call, tensors

    with torch.no_grad():
        torch.manual_seed(0)
        found = tensors(call(model, inputs))
        with zoo_kernels.backend("reference"):
            torch.manual_seed(0)
            expected = tensors(call(model, inputs))
    return max((relative_error(found[k], v) for k, v in expected.items() if v.is_floating_point()), default=0.0)


def _time(model: Any, inputs: dict[str, Any], place: Any, repeats: int, train: bool) -> tuple[float, list[float]]:
    """(milliseconds of the first call, of each later one)."""
    import torch

    from zoo.testing.cases import call, tensors

    def once() -> float:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        began = time.perf_counter()
        with torch.set_grad_enabled(train):
            outputs = tensors(call(model, inputs))
            if train:
                sum(o.float().square().mean() for o in outputs.values() if o.requires_grad).backward()  # type: ignore[union-attr]
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return (time.perf_counter() - began) * 1000

    first = once()
    once()
    return first, [once() for _ in range(repeats)]


def _peak(place: Any) -> int | None:
    """Peak memory: of the tensors on a GPU; of the whole process on a CPU (None where the system does not say)."""
    import importlib.util
    import sys

    import torch

    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_name(place: Any) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(place) if place.type == "cuda" else f"{place.type} ({platform.machine()})"
