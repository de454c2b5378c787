"""Change detection on CPU: a large pair against the same network on reference operators; memory against scene size.

    python benchmarks/remote_sensing.py pair       # MambaBCD-Tiny, 1024 x 1024, whole and in tiles
    python benchmarks/remote_sensing.py scenes     # GeoTIFF pairs of growing size, file to file

``pair``: one forward pass over a whole pair as this library computes it, the same network on reference operators
(``zoo_kernels.backend("reference")``: scans as loops in torch, all else torch's own modules, nothing fused or blocked),
and the pair through the pipeline in tiles. With ``--dtype bfloat16`` the reference runs in bfloat16 and, as a row of
its own, in float32. Ours and the reference must agree to 1e-3 of the largest value (5e-2 in bfloat16), or nothing is
reported. The fast pass is the best of ``--repeat``, the others run once.
``scenes``: ``pipeline.write`` from two GeoTIFFs to a map, a picture and a summary. Every figure of memory is the growth
of a new process's peak over what it held with the model built and libraries warm.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
import zoo_kernels


def build(name: str, dtype: str = "float32") -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.create(name).to(getattr(torch, dtype)).eval()


def pictures(size: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    before, after = torch.randn(1, 3, size, size), torch.randn(1, 3, size, size)
    return before.to(getattr(torch, dtype)), after.to(getattr(torch, dtype))


def _status(field: str) -> float:
    """Megabytes from Linux' own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    return float("nan")


class Growth:
    """``with Growth() as grown: ...``, then ``grown.megabytes`` and ``grown.seconds``."""

    def __enter__(self) -> Growth:
        self.before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.began
        self.megabytes = max(_status("VmHWM") - self.before, 0.0)


# -- one large pair


def run_pair(how: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way of computing the pair, in this process; the answer goes to ``options.answer``."""
    dtype = "float32" if how == "reference_float32" else options.dtype
    model = build(options.model, dtype)
    before, after = pictures(options.size, dtype)
    with torch.inference_mode():
        model(before[..., :64, :64], after[..., :64, :64])  # libraries and their buffers
        if how == "tiles":
            pipe: Any = zoo.pipeline(model, tile=options.tile, overlap=options.overlap)
            pair = tuple(
                (x[0].float().permute(1, 2, 0).clamp(-2, 2) * 60 + 128).to(torch.uint8).numpy() for x in (before, after)
            )
            times = []
            with Growth() as grown:
                pipe(pair)
            times.append(grown.seconds)
        else:
            times = []
            with Growth() as grown:
                if how.startswith("reference"):
                    with zoo_kernels.backend("reference"):
                        answer = model(before, after)
                else:
                    answer = model(before, after)
            times.append(grown.seconds)
            if how == "ours":
                for _ in range(options.repeat - 1):
                    began = time.perf_counter()
                    model(before, after)
                    times.append(time.perf_counter() - began)
            if options.answer:
                np.save(options.answer, answer.float().numpy())
    return {"how": how, "seconds": min(times), "rounds": [round(t, 2) for t in times], "peak_mb": grown.megabytes}


# -- scenes of growing size


def write_scene(path: Path, size: int, seed: int) -> None:
    """A GeoTIFF of noise over broad fields, written in strips: making it needs no more memory than mapping it."""
    import rasterio
    from rasterio.windows import Window

    rng = np.random.default_rng(seed)
    with rasterio.open(
        path, "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8", crs="EPSG:32632", tiled=True,
        blockxsize=256, blockysize=256, transform=rasterio.transform.from_origin(500_000, 5_400_000, 1.0, 1.0),
    ) as file:  # fmt: skip
        for top in range(0, size, 256):
            height = min(256, size - top)
            file.write(rng.integers(90, 160, (3, height, size), dtype=np.uint8), window=Window(0, top, size, height))


def run_scene(size: int, options: argparse.Namespace) -> dict[str, Any]:
    pipe: Any = zoo.pipeline(build(options.model, options.dtype), tile=options.tile, overlap=options.overlap)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for seed, name in enumerate(("small_before", "small_after")):
            write_scene(where / f"{name}.tif", 2 * options.tile, seed)
        for seed, name in enumerate(("before", "after")):
            write_scene(where / f"{name}.tif", size, seed)
        pipe.write((where / "small_before.tif", where / "small_after.tif"), where / "w.tif", picture=where / "w.png")
        with Growth() as grown:
            pipe.write(
                (where / "before.tif", where / "after.tif"), where / "map.tif", picture=where / "map.png",
                summary=where / "map.json",
            )  # fmt: skip
    pixels = 2 * 3 * size * size / 2**20
    return {"size": size, "scene_mb": pixels, "seconds": grown.seconds, "peak_mb": grown.megabytes}


# -- both


def child(options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """One measurement in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, options.what, "--model", options.model, *words]
    for name in ("size", "tile", "overlap", "threads", "repeat", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def pair(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        ways = ("ours", "reference") + (("reference_float32",) if options.dtype != "float32" else ())
        files = {how: Path(folder) / f"{how}.npy" for how in ways}
        rows = [child(options, "--child", how, "--answer", str(files[how])) for how in files]
        ours, *references = (np.load(files[how]) for how in files)
    errors = {
        how: float(np.abs(ours - answer).max() / np.abs(answer).max())
        for how, answer in zip(ways[1:], references, strict=True)
    }
    allowed = 1e-3 if options.dtype == "float32" else 5e-2
    for how, error in errors.items():
        if not error < allowed:
            raise SystemExit(f"{how} and ours differ by {error:.1e} of the largest value (allowed {allowed})")
    rows.append(child(options, "--child", "tiles"))
    slow = {how: row["seconds"] for how, row in zip(ways, rows, strict=False) if how != "ours"}
    titles = " ".join(f"{'times ' + how:>24s}" for how in slow)
    print(f"{'way':18s} {'seconds':>8s} {'peak MB':>8s} {titles}")
    for row in rows:
        row["times_faster_than"] = {how: seconds / row["seconds"] for how, seconds in slow.items()}
        ratios = " ".join(f"{ratio:24.1f}" for ratio in row["times_faster_than"].values())
        print(f"{row['how']:18s} {row['seconds']:8.2f} {row['peak_mb']:8.0f} {ratios}")
    print("largest difference, relative: " + ", ".join(f"{error:.1e} ({how})" for how, error in errors.items()))
    return [row | {"relative_error": errors} for row in rows]


def scenes(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [child(options, "--child", str(size)) for size in options.sizes]
    print(f"{'scene':>12s} {'its MB':>8s} {'peak MB':>8s} {'seconds':>8s}")
    for row in rows:
        shape = f"{row['size']} x {row['size']}"
        print(f"{shape:>12s} {row['scene_mb']:8.0f} {row['peak_mb']:8.0f} {row['seconds']:8.1f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pair", "scenes"])
    parser.add_argument("--model", help="default: changemamba_bcd_tiny for pair, changemamba_micro for scenes")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--tile", type=int, help="default: 512 for pair, 256 for scenes")
    parser.add_argument("--overlap", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or ("changemamba_bcd_tiny" if options.what == "pair" else "changemamba_micro")
    options.tile = options.tile or (512 if options.what == "pair" else 256)
    torch.set_num_threads(options.threads)
    if options.child:
        found = run_pair(options.child, options) if options.what == "pair" else run_scene(int(options.child), options)
        print(json.dumps(found))
        return
    rows = pair(options) if options.what == "pair" else scenes(options)
    if options.json:
        cpu = next(
            (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
        )
        about = {"device": cpu or platform.machine(), "threads": options.threads, "torch": torch.__version__}
        about |= {"model": options.model, "dtype": options.dtype, "tile": options.tile, "overlap": options.overlap}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": about, "command": sys.argv[1:], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
