"""Train sashimi_micro on generated plucked strings and measure it on notes it has not heard.

    python plugins/audio/recipes/train_plucks.py

The notes are made by the Karplus-Strong algorithm (a burst of noise in a delay line whose neighbours are averaged at
every turn), 8 kHz, half a second each: pitches of five strings, random decay, burst and loudness. The test notes come
from another seed. Prints one line of JSON at the end: -log2 p of a sample on the test notes, next to what a table of
the samples' own frequencies and of pairs of neighbours would need.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import zoo
from zoo_audio.files import write_audio
from zoo_audio.generation import bits_per_sample
from zoo_audio.mulaw import mu_law_encode

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_audio"
RATE, LENGTH = 8000, 4096
PERIODS = (25, 34, 45, 57, 72)  #: of the delay line in samples: 320 to 111 Hz


def pluck(draw: np.random.Generator) -> np.ndarray:
    """One note, (LENGTH,) float32 in [-1, 1]: a short silence, then a plucked string."""
    period = int(draw.choice(PERIODS))
    decay = draw.uniform(0.985, 0.999)
    line = draw.uniform(-1, 1, period)
    line = np.convolve(np.concatenate([line, line]), [0.25, 0.5, 0.25], "same")[:period]  # a soft plectrum
    start = int(draw.integers(50, 400))
    out = np.zeros(LENGTH)
    at, turn = start, line
    while at < LENGTH:
        count = min(period, LENGTH - at)
        out[at : at + count] = turn[:count]
        turn = decay * 0.5 * (turn + np.roll(turn, 1))
        at += period
    return (out / np.abs(out).max() * draw.uniform(0.3, 0.95)).astype(np.float32)


def notes(count: int, seed: int) -> torch.Tensor:
    """(count, LENGTH) token ids."""
    draw = np.random.default_rng(seed)
    audio = torch.from_numpy(np.stack([pluck(draw) for _ in range(count)]))
    return mu_law_encode(audio[..., None], scale=False)[..., 0]


def tables(train: torch.Tensor, test: torch.Tensor) -> dict[str, float]:
    """Bits a sample of the samples' frequencies, and of each given its neighbour, counted on the training notes."""
    single = torch.bincount(train.flatten(), minlength=256).double() + 1
    pairs = (
        torch.bincount((train[:, :-1] * 256 + train[:, 1:]).flatten(), minlength=65536).view(256, 256).double() + 0.1
    )
    one = -(single / single.sum()).log2()[test].mean()
    two = -(pairs / pairs.sum(1, keepdim=True)).log2()[test[:, :-1], test[:, 1:]].mean()
    return {"frequencies": round(float(one), 3), "pairs": round(float(two), 3)}


def train(data: torch.Tensor, *, steps: int, rows: int, rate: float, seed: int, minutes: float = math.inf):
    """AdamW; the parameters of the state matrices at a quarter of the rate and without decay, as S4 is trained.
    ``minutes``: a limit of time, towards which the schedule then runs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = zoo.create("sashimi_micro").train()
    slow = [p for n, p in model.named_parameters() if n.endswith(("A_real", "A_imag", ".B", "inv_dt", ".P"))]
    other = [p for p in model.parameters() if not any(p is s for s in slow)]
    optimizer = torch.optim.AdamW(
        [{"params": other, "lr": rate, "weight_decay": 0.01}, {"params": slow, "lr": rate / 4, "weight_decay": 0.0}],
        fused=True,
    )
    began, started, total = time.process_time(), time.monotonic(), 0.0
    for step in range(1, steps + 1):
        progress = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        if progress >= 1:
            break
        for group, peak in zip(optimizer.param_groups, (rate, rate / 4), strict=True):
            group["lr"] = peak * min(step / 40, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        ids = data[torch.randint(0, len(data), (rows,), generator=generator)]
        start = torch.full_like(ids[:, :1], 128)
        logits = model(torch.cat([start, ids[:, :-1]], dim=1))
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 50 == 0:
            spent = time.process_time() - began
            print(f"step {step}: {total / 50 / math.log(2):.3f} bits a sample, {spent:.0f} s", flush=True)
            total = 0.0
    print(f"{step} steps", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE / "demo" / "sashimi_micro.plucks.safetensors")
    parser.add_argument("--notes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, whatever --steps is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", action="store_true", help="write examples/pluck.wav, a note of the test, only")
    parser.add_argument("--only-score", action="store_true", help="measure the weights in --out, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sample:
        note = pluck(np.random.default_rng(arguments.seed + 1))[:1500]
        write_audio(PACKAGE / "examples" / "pluck.wav", note, RATE)
        return
    data, test = notes(arguments.notes, arguments.seed), notes(128, arguments.seed + 1)
    began = time.process_time()
    if not arguments.only_score:
        model = train(
            data, steps=arguments.steps, rows=arguments.rows, rate=arguments.rate, seed=arguments.seed,
            minutes=arguments.minutes,
        )  # fmt: skip
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, arguments.out, metadata={"format": "pt"})
    spent = time.process_time() - began
    model = zoo.load("sashimi_micro", checkpoint=arguments.out)
    measured = sum(bits_per_sample(model, part) for part in test.split(16)) / 8
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_notes": len(test),
        "bits_per_sample": {"model": round(measured, 3)} | tables(data, test),
        "cpu_seconds": round(spent),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
