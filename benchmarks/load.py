"""How long importing, listing and loading take, against the bare cost of the same work and against timm.

    python benchmarks/load.py                       # prints a table of ratios
    python benchmarks/load.py --json > load.json

A checkpoint of random weights is put into a Hub cache of its own, so nothing is downloaded and nothing of yours is
touched. Each figure is a median over repeats in one process (loading) or over new processes (import, list); the peers
run in the same process, in turn. "bare" builds the module on the meta device, maps the file with safetensors and
assigns it with load_state_dict(assign=True): the least that any loader must do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO, REVISION = "bench/model", "0123456789abcdef0123456789abcdef01234567"


def child(mode: str, home: str, model: str, repeats: int) -> Any:
    env = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, __file__, "--child", mode, "--model", model, "--repeats", str(repeats)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def new_process(code: str, repeats: int) -> float:
    """Median seconds of a new interpreter that runs ``code``."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# -- in the child processes ------------------------------------------------------------------------------------------


def card(model: str) -> Any:
    """The model's card under another name, with the checkpoint in the prepared cache as its weights."""
    import msgspec

    from zoo_registry import WeightsCard, manager, resolve
    from zoo_registry.hookspecs import hookimpl

    weights = WeightsCard(tag="random", repo_id=REPO, filename="model.safetensors", revision=REVISION, licence="none")
    own = msgspec.structs.replace(resolve(model).card, name="bench_model", aliases=(), weights={"random": weights})
    own = msgspec.structs.replace(own, default_tag="random")

    class Plugin:
        ZOO_PLUGIN_API = 1

        @hookimpl
        def zoo_models(self):
            return [own]

    manager().register(Plugin(), name="bench")
    return own


def prepare(model: str) -> dict[str, Any]:
    """Write the checkpoint as the Hub's cache keeps it."""
    import zoo
    from zoo.checkpoints import write_safetensors

    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--{REPO.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    write_safetensors(zoo.create(model).state_dict(), snapshot / "model.safetensors")
    return {"bytes": (snapshot / "model.safetensors").stat().st_size}


def loading(model: str, repeats: int) -> dict[str, Any]:
    """Seconds of zoo.load, of the bare work, and of timm (where it has the architecture), in turn."""
    import timm
    import torch
    from safetensors import safe_open

    import zoo
    from zoo.catalog import import_object

    own = card(model)
    path = Path(os.environ["HF_HOME"]) / f"hub/models--bench--model/snapshots/{REVISION}/model.safetensors"

    def bare() -> Any:
        with torch.device("meta"):
            module = import_object(own.builder)(**own.config)
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        module.load_state_dict(state, assign=True)
        return module.eval()

    ways = {"zoo": lambda: zoo.load("bench_model"), "bare": bare}
    if timm.is_model(model):
        overlay = {"hf_hub_id": REPO, "custom_load": False}
        ways["timm"] = lambda: timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    times: dict[str, list[float]] = {name: [] for name in ways}
    made = {name: way() for name, way in ways.items()}  # first calls: imports, caches
    for name, module in made.items():  # a loader that loads something else is not timed
        for key, tensor in made["bare"].state_dict().items():
            if not torch.equal(module.state_dict()[key], tensor):
                raise SystemExit(f"{name} loaded another {key}")
    del made
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            module = way()
            times[name].append(time.perf_counter() - began)
            del module
    return {name: statistics.median(values) for name, values in times.items()}


def memory(model: str) -> dict[str, Any]:
    """Peak resident bytes that zoo.load adds in a process that has everything imported."""
    import resource

    import timm  # noqa: F401 - its import is not what is measured

    import zoo
    from zoo.catalog import import_object

    own = card(model)
    import_object(own.builder)
    zoo.load, zoo.create("bench_model", device="meta")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = zoo.load("bench_model")
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(float(p.detach().float().sum()) for p in module.parameters())  # reads every weight
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"load": (loaded - before) * 1024, "touched": (touched - before) * 1024, "sum": total}


# -- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="mambaout_small", help="an architecture of the zoo; timm's where timm has it"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work = {"prepare": lambda: prepare(options.model), "memory": lambda: memory(options.model)}
        work["loading"] = lambda: loading(options.model, options.repeats)
        print(json.dumps(work[options.child]()))
        return

    python = new_process("pass", options.repeats)
    imported = new_process("import zoo", options.repeats) - python
    listed = new_process("from zoo.cli import run; run(['list'])", options.repeats)
    with tempfile.TemporaryDirectory() as home:
        size = child("prepare", home, options.model, 1)["bytes"]
        seconds = child("loading", home, options.model, options.repeats)
        peak = child("memory", home, options.model, 1)
    allowed = size + 100e6
    rows = [
        ("import zoo, beyond an empty interpreter", f"{imported:.3f} s", "0.3 s", imported / 0.3),
        ("zoo list, whole new process", f"{listed:.3f} s", "0.6 s", listed / 0.6),
        (
            "zoo.load / bare map and assign",
            f"{seconds['zoo']:.4f} s",
            f"{seconds['bare']:.4f} s",
            _over(seconds, "bare"),
        ),
    ]
    if "timm" in seconds:
        rows.append(
            (
                "zoo.load / timm.create_model",
                f"{seconds['zoo']:.4f} s",
                f"{seconds['timm']:.4f} s",
                _over(seconds, "timm"),
            )
        )
    rows.append(
        (
            "peak memory of zoo.load / weights + 100 MB",
            f"{peak['load'] / 1e6:.1f} MB",
            f"{allowed / 1e6:.1f} MB",
            peak["load"] / allowed,
        )
    )
    rows.append(
        (
            "the same, every weight read",
            f"{peak['touched'] / 1e6:.1f} MB",
            f"{allowed / 1e6:.1f} MB",
            peak["touched"] / allowed,
        )
    )
    if options.json:
        print(json.dumps({"model": options.model, "bytes": size, "rows": rows, "machine": platform.processor()}))
        return
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{options.model}, {size / 1e6:.0f} MB; {machine}")
    for title, ours, against, ratio in rows:
        print(f"{title:<46}{ours:>12}{against:>12}{ratio:>8.2f}")


def _over(seconds: dict[str, float], peer: str) -> float:
    return seconds["zoo"] / seconds[peer]


if __name__ == "__main__":
    main()
