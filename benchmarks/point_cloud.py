"""Point clouds: points a second against the reference operators and naive geometry, and the memory of a large scene.

    python benchmarks/point_cloud.py speed                       # CPU, 2048 points, batch 8
    python benchmarks/point_cloud.py speed --models pcm_tiny_scanobjectnn --threads 1
    python benchmarks/point_cloud.py speed --dtype bfloat16      # ours in bfloat16, the peer in float32 and bfloat16
    python benchmarks/point_cloud.py scene --points 250000 1000000

``speed``: one forward pass from points to logits. The peer is the same network and weights as its definition reads, in
torch's own modules: the operators' definitions (``zoo_kernels.backend("reference")``: the scan steps in a Python loop,
products are torch's choice of library, no batch norm is folded, whole groups lie in memory), farthest points one after
the other in torch and neighbours from all pairs, sorted. Before anything is timed the two must agree (relative error
below 1e-3). Rounds alternate; ``ratio`` compares each side's best round, ``ratio_of_medians`` their medians.

With ``--dtype bfloat16`` our weights and what lies between the layers are in bfloat16 (coordinates, neighbours and the
states of scans stay float32). The peer is the float32 definition, and as a second figure the definition in bfloat16;
``relative_error`` is ours against float32, ``peer_relative_error`` that of the definition in bfloat16; ours must be
less than one and a half times the latter.

``scene``: a made-up room with colours, one point a voxel, through the segmentation pipeline in a new process for each
size; memory is the growth of the process's peak over what it holds once model and scene are there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import zoo
import zoo_kernels
from zoo_point_cloud import geometry, grouping, pcm_parts, pointmamba
from zoo_point_cloud.files import Cloud

MODELS = ["pcm_micro", "pcm_tiny_scanobjectnn", "pointmamba_scan_hardest"]


def naive_farthest_points(points: Tensor, count: int, *, skip_origin: bool = False) -> Tensor:
    """One point after the other, in torch, for the whole batch; as point networks without compiled extensions do."""
    batch, n, _ = points.shape
    chosen = torch.zeros(batch, count, dtype=torch.long)
    nearest = torch.full((batch, n), 1e10)
    if skip_origin:
        nearest[points.pow(2).sum(-1) <= 1e-3] = -1
    rows, farthest = torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    for i in range(count):
        chosen[:, i] = farthest
        centre = points[rows, farthest].view(batch, 1, 3)
        nearest = torch.minimum(nearest, ((points - centre) ** 2).sum(-1))
        farthest = nearest.max(-1).indices
    return chosen


def naive_neighbours(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All pairs, sorted."""
    distance = ((query[:, :, None] - points[:, None]) ** 2).sum(-1)
    found = distance.sort(dim=-1, stable=True)
    return found.values[..., :k], found.indices[..., :k]


def naive_geometry():
    found = {"farthest_point_sample": naive_farthest_points, "nearest_neighbours": naive_neighbours}
    return [
        mock.patch.object(module, name, value)
        for module in (geometry, grouping, pcm_parts, pointmamba)
        for name, value in found.items()
        if hasattr(module, name)
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


def speed(options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(options.threads)
    g = torch.Generator().manual_seed(0)
    points = torch.randn(options.batch, options.points[0], 3, generator=g)
    points = points / points.norm(dim=-1, keepdim=True) * torch.rand(options.batch, options.points[0], 1, generator=g)
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        model = zoo.create(name).eval()
        given = [points]
        if name.startswith("pcm") and model.encoder.in_chans == 4:
            given.append(torch.cat([points, points[..., 1:2] - points[..., 1:2].amin(1, keepdim=True)], -1).mT)

        dtype = getattr(torch, options.dtype)
        quick = copy.deepcopy(model).to(dtype)

        def ours(model=quick, given=given) -> Tensor:
            return model(*given)

        def peer(model=model, given=given) -> Tensor:
            with contextlib.ExitStack() as stack:
                for patch in naive_geometry():
                    stack.enter_context(patch)
                stack.enter_context(zoo_kernels.backend("reference"))
                return model(*given)

        sides = {"ours": ours, "peer": peer}
        if dtype != torch.float32:
            sides["peer_same_dtype"] = functools.partial(peer, quick)
        with torch.inference_mode():
            expected = peer()
            error = {side: relative_error(call(), expected) for side, call in sides.items() if side != "peer"}
            most = 1e-3 if dtype == torch.float32 else 1.5 * error["peer_same_dtype"]
            if not error["ours"] < most:
                raise SystemExit(f"{name} differs from its reference by {error['ours']:.1e}: not timed")
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.repeat):
                ours()  # what the other side left in the caches is not this one's
                for side, call in sides.items():
                    start = time.perf_counter()
                    call()
                    times[side].append(time.perf_counter() - start)
        best = {side: min(found) for side, found in times.items()}
        total = options.batch * options.points[0]
        row = {
            "model": name,
            "points": options.points[0],
            "batch": options.batch,
            "threads": options.threads,
            "dtype": options.dtype,
            "points_per_second": round(total / best["ours"]),
            "reference_points_per_second": round(total / best["peer"]),
            "ratio": round(best["peer"] / best["ours"], 2),
            "ratio_of_medians": round(float(np.median(times["peer"]) / np.median(times["ours"])), 2),
            "relative_error": error["ours"],
        }
        if "peer_same_dtype" in best:
            row["ratio_to_reference_in_same_dtype"] = round(best["peer_same_dtype"] / best["ours"], 2)
            row["peer_relative_error"] = error["peer_same_dtype"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def made_up_room(count: int) -> Cloud:
    """A floor, walls and boxes on a grid of 5 cm with a centimetre of noise: about one point a voxel of 4 cm."""
    r = np.random.default_rng(0)
    side = int(np.sqrt(count))
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    flat = np.stack([x.ravel(), y.ravel()], axis=1) * 0.05
    height = np.where((flat // 2.0).astype(int).sum(axis=1) % 3 == 0, 0.75, 0.0)
    points = np.column_stack([flat, height]) + r.normal(0, 0.005, (side * side, 3))
    return Cloud(points.astype(np.float32), r.random((side * side, 3)).astype(np.float32))


def scene(options: argparse.Namespace) -> list[dict]:
    rows = []
    for count in options.points:
        words = [sys.executable, "-W", "ignore", __file__, "scene", "--child", "--points", str(count)]
        words += ["--threads", str(options.threads), "--width", str(options.width), "--block", str(options.block)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def scene_child(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = zoo.create("pcm_s3dis", embed_dim=options.width).eval()
    pipe = zoo.pipeline(model, block_points=options.block)
    sizes: list[int] = []
    whole = model._whole

    def counted(pos: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(pos.shape[1])
        return whole(pos, *rest)

    model._whole = counted
    pipe(made_up_room(5000))  # what the first call sets up is not the scene's
    sizes.clear()
    cloud = made_up_room(options.points[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = pipe(cloud)
    assert len(result.labels) == len(cloud)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        json.dumps(
            {
                "points": len(cloud),
                "blocks": len(sizes),
                "largest_block": max(sizes),
                "width": options.width,
                "peak_growth_mb": round(grown),
                "bytes_a_point": round(grown * 2**20 / len(cloud)),
                "cpu_seconds": round(time.process_time() - start, 1),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "scene"])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--points", nargs="+", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of our side of the speed")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--width", type=int, default=96, help="embed_dim of the scene's pcm_s3dis (published: 96)")
    parser.add_argument("--block", type=int, default=24576, help="most points of a scene's block")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.points = options.points or ([2048] if options.what == "speed" else [250_000, 1_000_000])
    if options.child:
        scene_child(options)
        return
    rows = speed(options) if options.what == "speed" else scene(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
