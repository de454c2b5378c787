"""UniAnimate's network against a plain form of itself, and its two layers over frames against each other.

    python benchmarks/animation.py --threads 2 --json benchmarks/results/animation.json

*network*: one forward pass of a UNet of 64, 128 and 256 channels on 16 frames of 256 x 384 (latents 32 x 48), against
the same weights in a plain form: torch's modules for contiguous maps, all frames at once, the context repeated for
every frame, attention by torch's scaled_dot_product_attention. Outputs must agree to 1e-4.

*a step*: conditions encoded before, once for all steps of a sampling, against encoded in every step.

*frames*: the temporal Mamba beside the temporal transformer, 320 channels, 16 pixels, by the number of frames.

Memory is what the peak of a process of its own lies above what it held before the pass (Linux). Runs alternate, and
the best of each is compared. Weights are random: what is measured is cost, not quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_generation.unianimate import layers
from zoo_generation.unianimate.unet import UNet

FRAMES, SIZE = 16, (256, 384)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def network(temporal: str = "transformer") -> UNet:
    torch.manual_seed(0)
    sizes = {"dim": 64, "dim_mult": (1, 2, 4), "num_heads": 2, "head_dim": 32, "attn_scales": (0.5, 0.25)}
    return UNet(**sizes, resolution=SIZE, temporal=temporal, zero_init=False, decoder_context_dim=1024).eval()


def given() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    h, w = SIZE[1] // 8, SIZE[0] // 8
    x, ref = (torch.randn(1, 4, FRAMES, h, w, generator=g) for _ in range(2))
    pose = torch.rand(1, 3, FRAMES + 1, SIZE[1], SIZE[0], generator=g)
    image = torch.randn(1, 1, 1024, generator=g)
    return x, torch.tensor([500]), {"image": image, "dwpose": pose, "randomref": ref}


# -- the plain form ---------------------------------------------------------------------------------------------------


def _attention(m: layers.Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
    context = x if context is None else context
    q, k, v = (F.linear(a, f.weight) for a, f in ((x, m.to_q), (context, m.to_k), (context, m.to_v)))
    q, k, v = (t.unflatten(-1, (m.heads, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(y, m.to_out[0].weight, m.to_out[0].bias)


def _block(m: layers.TransformerBlock, x: Tensor, context: Tensor | None) -> Tensor:
    x = x + _attention(m.attn1, m.norm1(x))
    x = x + _attention(m.attn2, m.norm2(x), context)
    value, gate = F.linear(m.norm3(x), m.ff.net["0"].proj.weight, m.ff.net["0"].proj.bias).chunk(2, -1)
    return x + F.linear(value * F.gelu(gate), m.ff.net["2"].weight, m.ff.net["2"].bias)


def _layer(m: nn.Module, x: Tensor, e: Tensor, context: Tensor, frames: int) -> Tensor:
    h, w = x.shape[2:]
    if isinstance(m, layers.ResBlock):
        y = m.in_layers["2"](F.silu(m.in_layers["0"](x))) + m.emb_layers["1"](F.silu(e))[:, :, None, None]
        y = m.out_layers["3"](F.silu(m.out_layers["0"](y))) + m.skip_connection(x)
        video = z = y.unflatten(0, (-1, frames)).transpose(1, 2)
        for i in range(1, 5):
            norm, conv = m.temporal_conv.get_submodule(f"conv{i}").values()
            z = conv(F.silu(norm(z)))
        return (video + z).transpose(1, 2).flatten(0, 1)
    if isinstance(m, layers.SpatialTransformer):
        y = F.linear(m.norm(x).flatten(2).transpose(1, 2), m.proj_in.weight, m.proj_in.bias)
        y = F.linear(_block(m.transformer_blocks[0], y, context), m.proj_out.weight, m.proj_out.bias)
        return x + y.transpose(1, 2).unflatten(2, (h, w))
    if isinstance(m, layers.TemporalTransformer):
        video = x.unflatten(0, (-1, frames)).transpose(1, 2)
        y = m.proj_in(m.norm(video).permute(0, 3, 4, 1, 2).flatten(0, 2))
        y = m.proj_out(_block(m.transformer_blocks[0], y.transpose(1, 2), None).transpose(1, 2))
        y = y.unflatten(0, (-1, h, w)).permute(0, 3, 4, 1, 2)
        return (video + y).transpose(1, 2).flatten(0, 1)
    return m(x)


def plain(model: UNet, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    encoded = model.encode(x.shape, **conditions)
    frames = x.shape[2] + 1
    y = model.unified(x, encoded).contiguous()
    e = model.embed(t).repeat_interleave(frames, 0)
    context, skips = encoded.context.repeat_interleave(frames, 0), []
    for block in model.input_blocks:
        for m in block if isinstance(block, nn.ModuleList) else [block]:
            y = _layer(m, y, e, context, frames)
        skips.append(y)
    for m in model.middle_block:
        y = _layer(m, y, e, context, frames)
    for block in model.output_blocks:
        y = torch.cat([y, skips.pop()], 1)
        for m in block:
            y = _layer(m, y, e, context, frames)
    y = model.out["2"](F.silu(model.out["0"](y)))
    return y.unflatten(0, (-1, frames)).transpose(1, 2)[:, :, 1:]


# -- measuring --------------------------------------------------------------------------------------------------------


def best(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def one(what: str, frames: int) -> float:
    """Megabytes that one pass of ``what`` adds to the peak of this process."""
    with torch.inference_mode():
        if what in ("ours", "plain"):
            model, (x, t, conditions) = network(), given()
            run: Callable[[], object] = (
                (lambda: model(x, t, **conditions)) if what == "ours" else (lambda: plain(model, x, t, conditions))
            )
        else:
            layer, z = over_frames(what, frames)
            run = lambda: layer(z, frames)  # noqa: E731
        before = highest()
        run()
        return (highest() - before) / 1024


def highest() -> int:
    """The peak of this process so far in kilobytes; getrusage would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def over_frames(what: str, frames: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "mamba": lambda: layers.TemporalMamba(320, 320, zero_init=False),
        "transformer": lambda: layers.TemporalTransformer(320, 5, 64, zero_init=False),
    }
    return made[what]().eval(), torch.randn(frames, 320, 4, 4).contiguous(memory_format=torch.channels_last)


def peak(what: str, frames: int, threads: int) -> float:
    command = [sys.executable, __file__, "--one", what, "--frames", str(frames), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["network", "frames"], help="One of them.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(one(arguments.one, arguments.frames))
        return
    rows: dict[str, object] = {}
    with torch.inference_mode():
        if arguments.part != "frames":
            model, (x, t, conditions) = network(), given()
            a, b = model(x, t, **conditions), plain(model, x, t, conditions)
            assert (a - b).abs().max() <= 1e-4 * b.abs().max(), "outputs differ"
            found = best(
                {"ours": lambda: model(x, t, **conditions), "plain": lambda: plain(model, x, t, conditions)},
                arguments.rounds,
            )
            memory = {k: peak(k, 0, arguments.threads) for k in found}
            rows["network"] = {"seconds": found, "megabytes": memory}
            encoded = model.encode(x.shape, **conditions)
            step: dict[str, Callable[[], object]] = {
                "conditions encoded before": lambda: model(x, t, conditions=encoded),
                "conditions encoded in it": lambda: model(x, t, **conditions),
            }
            rows["a step"] = {"seconds": best(step, arguments.rounds)}
            print(json.dumps(rows, indent=1), flush=True)
        if arguments.part != "network":
            table = []
            for frames in LENGTHS:
                pair = {name: over_frames(name, frames) for name in ("mamba", "transformer")}
                seconds = best(
                    {name: lambda m=m, z=z, f=frames: m(z, f) for name, (m, z) in pair.items()},
                    arguments.rounds if frames < 1024 else 2,
                )
                memory = {name: peak(name, frames, arguments.threads) for name in pair}
                table.append({"frames": frames, "seconds": seconds, "megabytes": memory})
                print(json.dumps(table[-1]), flush=True)
            rows["frames"] = table
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(kept | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
