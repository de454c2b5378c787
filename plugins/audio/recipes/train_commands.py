"""Train samba_asr_micro on commands and digit strings spoken by espeak-ng, and measure it on voices it never heard.

    apt-get install espeak-ng
    python plugins/audio/recipes/train_commands.py --cache speech
    python plugins/audio/recipes/train_commands.py --cache speech --steps 14347 --seed 1 --start FIRST --out SECOND

All speech is made here (``speech.py``): eight accents times the variants of espeak-ng, speeds 120 to 220 words a
minute, pitches, pauses, white and pink noise at 10 to 40 dB, levels down to -20 dB. Every seventh variant is held out
and speaks the test. The model learns to write with its CTC head and with its decoder at once; both are measured.
Prints one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from speech import plan, speak_all, variants

import zoo
from zoo_audio.features import LogMel
from zoo_audio.text import Tokenizer, train_tokenizer

PACKAGE = Path(__file__).parents[1] / "src" / "zoo_audio"
Spoken = list[tuple[str, np.ndarray]]  #: (text, features (frames, mels) in half precision)


def prepare(count: int, names: list[str], seed: int, mel: LogMel, cache: Path | None, workers: int) -> Spoken:
    """Texts and features of ``count`` utterances, from ``cache`` if it is there."""
    if cache is not None and cache.exists():
        kept = np.load(cache)
        return list(zip(kept["texts"].tolist(), np.split(kept["features"], kept["ends"][:-1]), strict=True))
    made: Spoken = []
    for said, audio in speak_all(plan(count, names, seed), workers):
        made.append((said.text, mel(torch.from_numpy(audio)[None])[0].half().numpy()))
        if len(made) % 1000 == 0:
            print(f"spoken: {len(made)} of {count}", flush=True)
    if cache is not None:
        ends = np.cumsum([len(f) for _, f in made])
        np.savez(cache, texts=[t for t, _ in made], features=np.concatenate([f for _, f in made]), ends=ends)
    return made


def batches(data: Spoken, tokenizer: Tokenizer, rows: int, seed: int):
    """Batches of utterances of like length without end; a quarter of them are followed by another one."""
    draw = random.Random(seed)
    while True:
        items = []
        for i in range(len(data)):
            text, features = data[i]
            if draw.random() < 0.25:
                other, more = data[draw.randrange(len(data))]
                text, features = f"{text} {other}", np.concatenate([features, more])
            items.append((text, features))
        items.sort(key=lambda item: len(item[1]) + draw.randint(-20, 20))
        groups = [items[i : i + rows] for i in range(0, len(items) - rows + 1, rows)]
        draw.shuffle(groups)
        for group in groups:
            ids = [torch.tensor(tokenizer.encode(text)) for text, _ in group]
            parts = [masked(torch.from_numpy(features).float(), draw) for _, features in group]
            yield (
                torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
                torch.tensor([len(p) for p in parts]),
                torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
                torch.tensor([len(i) for i in ids]),
            )


def masked(features: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """One band of frequencies and one short stretch of time blanked, and a random change of level (SpecAugment)."""
    features = features + draw.uniform(-0.15, 0.15)
    low, wide = draw.randrange(features.shape[1]), draw.randint(0, 12)
    features[:, low : low + wide] = 0
    start, long = draw.randrange(len(features)), draw.randint(0, 8)
    features[start : start + long] = 0
    return features


def train(
    data: Spoken,
    tokenizer: Tokenizer,
    *,
    steps: int,
    rows: int,
    rate: float,
    seed: int,
    minutes: float = math.inf,
    start: Path | None = None,
) -> torch.nn.Module:
    """AdamW with a warm-up and a cosine to zero, gradients clipped. ``minutes``: a limit of time, towards which the
    cosine then runs; ``start``: weights to go on from."""
    torch.manual_seed(seed)
    if start is None:
        model = zoo.create("samba_asr_micro", vocab_size=len(tokenizer)).train()
    else:
        model = zoo.load("samba_asr_micro", checkpoint=start, dtype=torch.float32).train()
    groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for key, parameter in model.named_parameters():
        groups[parameter.dim() > 1 and not key.endswith("A_log")].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.01}, {"params": groups[False], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    began, started, total = time.process_time(), time.monotonic(), 0.0
    for step, batch in zip(range(1, steps + 1), batches(data, tokenizer, rows, seed), strict=False):
        progress = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / 200, 0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * progress)))
        loss = model.loss(*batch, ctc_weight=1.0, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {total / 100:.3f}, {time.process_time() - began:.0f} s", flush=True)
            total = 0.0
    print(f"{step} steps", flush=True)
    return model.eval()


def measure(model: torch.nn.Module, tokenizer: Tokenizer, data: Spoken) -> dict[str, float]:
    """Word and character error rates in percent, of the CTC head and of the decoder, both greedy."""
    from zoo_audio.decoding import ctc_greedy, decode_greedy
    from zoo_audio.metrics import error_rates

    spoken: dict[str, list[str]] = {"ctc": [], "decoder": []}
    with torch.no_grad():
        for _, features in data:
            hidden, _ = model.encode(torch.from_numpy(features).float()[None])
            spoken["ctc"].append(tokenizer.decode(ctc_greedy(model.ctc(hidden)[0]).tokens))
            spoken["decoder"].append(tokenizer.decode(decode_greedy(model, hidden).tokens))
    found = {}
    for head, answers in spoken.items():
        rates = error_rates([text for text, _ in data], answers)
        found |= {f"{head} wer": round(100 * rates.wer, 2), f"{head} cer": round(100 * rates.cer, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE / "demo" / "samba_asr_micro.commands.safetensors")
    parser.add_argument("--tokenizer", type=Path, default=PACKAGE / "demo" / "commands.tokenizer.json")
    parser.add_argument("--utterances", type=int, default=12000)
    parser.add_argument("--test", type=int, default=700)
    parser.add_argument("--steps", type=int, default=4694)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, whatever --steps is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="espeak-ng processes at once")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the features between runs")
    parser.add_argument("--start", type=Path, help="go on from these weights, for a second run")
    parser.add_argument("--only-score", action="store_true", help="measure the weights in --out, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    mel = LogMel(80, scaling="fixed")
    names, held = variants()
    paths = {k: arguments.cache and arguments.cache / f"{k}.npz" for k in ("train", "test")}
    spent = 0.0
    if not arguments.only_score:
        data = prepare(arguments.utterances, names, arguments.seed, mel, paths["train"], arguments.workers)
        tokenizer = train_tokenizer([text for text, _ in data], 144, arguments.tokenizer)
        began = time.process_time()
        model = train(
            data, tokenizer, steps=arguments.steps, rows=arguments.rows, rate=arguments.rate, seed=arguments.seed,
            minutes=arguments.minutes, start=arguments.start,
        )  # fmt: skip
        spent = time.process_time() - began
        state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
        save_file(state, arguments.out, metadata={"format": "pt"})
    tokenizer = Tokenizer(arguments.tokenizer)
    # Measured as it is shipped: half precision on disk, float32 in memory.
    model = zoo.load("samba_asr_micro", checkpoint=arguments.out, dtype=torch.float32)
    test = prepare(arguments.test, held, arguments.seed + 1, mel, paths["test"], arguments.workers)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "voices": f"{len(names)} variants to train, {len(held)} held out, 8 accents each",
        "words": sum(len(text.split()) for text, _ in test),
        "percent": measure(model, tokenizer, test),
        "cpu_seconds": round(spent),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
