"""How long it takes to list every model in a new process, against timm's list of its own models.

    python benchmarks/listing.py [--cards 300] [--repeat 7]

Each line is the median of new processes, interpreter start included. ``zoo_registry`` lists what is installed, then
what is installed and ``--cards`` more cards from a plugin written for this run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CARD = """
[models.bench_{i}]
system = "bench"
domain = "bench"
task = "image-classification"
builder = "zoo_bench.models:Bench"
config = {{ embed_dim = 192, depth = 24, patch_size = 16, stride = 16, norm = "rms" }}
params = 7148008
paper = "arXiv 2401.00000"
[models.bench_{i}.weights.in1k]
repo_id = "org/bench-{i}"
filename = "bench.pth"
revision = "{revision}"
format = "torch"
licence = "apache-2.0"
preprocess = {{ mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225], interpolation = "bicubic" }}
metrics = [{{ name = "top-1", value = 76.1, dataset = "ImageNet-1k", split = "val", source = "README" }}]
"""

PLUGIN = """
from zoo_registry import hookimpl, load_cards
ZOO_PLUGIN_API = 1
@hookimpl
def zoo_models():
    return load_cards("zoo_bench_plugin")
"""


def write_plugin(folder: Path, cards: int) -> None:
    package = folder / "zoo_bench_plugin"
    (package / "cards").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(PLUGIN)
    for start in range(0, cards, 10):
        text = "".join(CARD.format(i=i, revision="a" * 40) for i in range(start, min(start + 10, cards)))
        (package / "cards" / f"family_{start}.toml").write_text(text)
    info = folder / "zoo_bench-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-bench\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zoo.plugins]\nbench = zoo_bench_plugin.plugin\n")


def median(code: str, repeat: int, path: str = "") -> tuple[float, str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    times, said = [], ""
    for _ in range(repeat + 1):  # the first fills the caches of the file system
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        said = done.stdout.strip()
    return statistics.median(times[1:]), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    listing = (
        "import sys, zoo_registry as r; n = len(r.manager().models()); assert 'torch' not in sys.modules; print(n)"
    )
    print(f"{platform.platform()}, Python {platform.python_version()}, median of {options.repeat} processes")
    with tempfile.TemporaryDirectory() as folder:
        write_plugin(Path(folder), options.cards)
        rows = [
            ("interpreter alone", *median("print(0)", options.repeat)),
            ("zoo_registry, installed", *median(listing, options.repeat)),
            (f"zoo_registry, {options.cards} more", *median(listing, options.repeat, folder)),
            ("timm.list_models()", *median("import timm; print(len(timm.list_models()))", options.repeat)),
        ]
    peer = rows[-1][1]
    for name, seconds, models in rows:
        print(f"{name:28} {seconds * 1e3:8.1f} ms   {models:>5} models   {seconds / peer:6.3f} of timm's time")


if __name__ == "__main__":
    main()
