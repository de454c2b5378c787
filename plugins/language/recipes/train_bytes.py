"""Train a small byte-level Mamba-2 on the King James Bible and measure it on held-out verses beside gzip and xz.

    apt-get install bible-kjv bible-kjv-text        # the text and the program that prints it
    python plugins/language/recipes/train_bytes.py

Text: the Debian packages ``bible-kjv`` and ``bible-kjv-text``; their copyright file says that the copyright of the King
James Version's text has expired (it is checked before training, and no text is written or kept). All 31102 verses in
the order of the books, one a line, without references. Split: the last 5 % of the verses (Colossians 4:5 to the end of
Revelation) are held out: never trained on, and nothing is chosen on them.

What is measured on the held-out bytes, in bits a byte:

- the model: -log2 p(byte | all bytes before it) over every held-out byte, read as one text with the state carried and
  nothing before it but one line feed; the size of the model's weights is not counted;
- ``gzip -9`` and ``xz -9e`` of the held-out bytes alone: whole files, headers counted; they have seen no other text;
- xz after the training text: what the held-out bytes add to ``xz -9e`` of the training text (its window holds all).

Prints one line of JSON at the end. Packages that are only unpacked (``dpkg -x``) serve with ``--root FOLDER``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo_language.scoring import score

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_language"
VERSES = 31102
HELD_OUT = 0.05
LICENCE = "The copyright for the King James Version text of the Bible is expired"


def verses(root: Path) -> list[bytes]:
    """The verses in order, each with a line feed. Raises SystemExit where the packages or their licence are missing."""
    copyright_file = root / "usr/share/doc/bible-kjv-text/copyright"
    program, data = root / "usr/bin/bible", root / "usr/lib/bible.data"
    absent = [str(path) for path in (copyright_file, program, data) if not path.exists()]
    if absent:
        raise SystemExit(f"{', '.join(absent)} not found: apt-get install bible-kjv bible-kjv-text")
    if LICENCE not in " ".join(copyright_file.read_text(encoding="utf-8").split()):
        raise SystemExit(f"{copyright_file} does not say {LICENCE!r}: read it before you train on this text")
    command = [str(program.resolve()), "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, cwd=data.parent, capture_output=True, check=True).stdout
    lines = [line.split(b" ", 1)[1].strip() + b"\n" for line in printed.splitlines()]
    if len(lines) != VERSES:
        raise SystemExit(f"{program} printed {len(lines)} verses; expected {VERSES}")
    return lines


def split(root: Path) -> tuple[bytes, bytes]:
    """The bytes to train on and the held-out bytes."""
    lines = verses(root)
    first = round(len(lines) * (1 - HELD_OUT))
    return b"".join(lines[:first]), b"".join(lines[first:])


def compressors(train: bytes, held: bytes) -> dict[str, float]:
    """Bits per held-out byte of gzip -9, xz -9e, and xz -9e that has read the training text."""

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    sizes = {
        "gzip -9": len(gzip.compress(held, 9, mtime=0)),
        "xz -9e": xz(held),
        "xz -9e after the training text": xz(train + held) - xz(train),
    }
    return {name: 8 * size / len(held) for name, size in sizes.items()}


def batches(data: Tensor, rows: int, length: int, generator: torch.Generator):
    """Random windows without end: ids (rows, length) and the bytes that follow each."""
    while True:
        start = torch.randint(0, len(data) - length - 1, (rows,), generator=generator)
        window = data[start[:, None] + torch.arange(length + 1)].long()
        yield window[:, :-1], window[:, 1:]


def train(name: str, data: bytes, *, steps: int, rows: int, length: int, rate: float, seed: int) -> torch.nn.Module:
    """AdamW with a warm-up and a cosine to a hundredth of ``rate``; no dropout: one pass hardly fits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = zoo.create(name).train()
    free = model.no_weight_decay()
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for key, parameter in model.named_parameters():
        groups[parameter.dim() > 1 and key not in free].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    warm = max(steps // 30, 1)

    def schedule(i: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * max(i - warm, 0) / max(steps - warm, 1)))
        return min((i + 1) / warm, 0.01 + 0.99 * cosine)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    source = batches(torch.frombuffer(bytearray(data), dtype=torch.uint8), rows, length, generator)
    began, total = time.perf_counter(), 0.0
    for step, (ids, target) in zip(range(1, steps + 1), source, strict=False):
        loss = F.cross_entropy(model(ids).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.item()
        if step % 100 == 0:
            spent = time.perf_counter() - began
            print(f"step {step}: {total / 100 / math.log(2):.3f} bits a byte, {spent:.0f} s", flush=True)
            total = 0.0
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba2_micro")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the Debian packages are installed")
    parser.add_argument("--out", type=Path, default=PACKAGE / "demo" / "mamba2_micro.bible.safetensors")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-score", action="store_true", help="measure the weights in --out, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, held = split(arguments.root)
    began = time.process_time()
    if arguments.only_score:
        model = zoo.load(arguments.model, checkpoint=arguments.out, dtype="float32")
    else:
        model = train(
            arguments.model, data, steps=arguments.steps, rows=arguments.rows, length=arguments.length,
            rate=arguments.rate, seed=arguments.seed,
        )  # fmt: skip
    spent = time.process_time() - began
    if not arguments.only_score:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
        save_file(state, arguments.out, metadata={"format": "pt"})
        model.half().float()  # measured as stored
    found = score(model, list(held), text_bytes=len(held), start=ord("\n"))
    figures = {
        "model": arguments.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_bytes": len(data),
        "held_out_bytes": len(held),
        "bits_per_byte": {"model": found.bits_per_byte} | compressors(data, held),
        "cpu_seconds": round(spent),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
