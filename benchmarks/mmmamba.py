"""mmMamba against its softmax teacher's form: reading a text and going on from it, at growing length.

    python benchmarks/mmmamba.py --threads 2 --json benchmarks/results/mmmamba.json

Three models of the same sizes (512 channels, 2 + 6 layers, 8 heads, 4 kv heads, random weights): every layer Mamba-2,
every fourth softmax, and every layer softmax, which is the teacher's form (HoVLE), with torch's scaled dot product
attention and a cache of keys and values. Each is first checked: reading in pieces gives the logits of the whole
(relative error below 1e-3). Then, at each length: seconds to read it (in pieces of 1024 tokens), milliseconds a token
behind it, bytes of the memory. Runs alternate, and the best of each is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from zoo_multimodal.mmmamba import MmMamba

FORMS = {"linear": ((), ()), "hybrid": ((0,), (2,)), "softmax": (range(2), range(6))}


def model(form: str) -> MmMamba:
    torch.manual_seed(0)
    sizes = {"heads": 8, "kv_heads": 4, "hidden": 1408}
    first, second = (list(indices) for indices in FORMS[form])
    return MmMamba(
        1000,
        512,
        {**sizes, "layers": 2, "softmax": first},
        {**sizes, "layers": 6, "softmax": second},
        image_size=32,
        patch_size=8,
        image_token=999,
    ).eval()


@torch.no_grad()
def check(m: MmMamba) -> None:
    ids = torch.randint(0, 999, (1, 700))
    whole = m(ids)[:, -1]
    state = m.prefill(ids[:, :-1], chunk=256)
    error = float((m.step(ids[:, -1], state) - whole).abs().max() / whole.abs().max())
    assert error < 1e-3, f"in pieces the logits differ by {error}"


def measure(m: MmMamba, length: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to read, seconds a token behind it, bytes of the state."""
    ids = torch.randint(0, 999, (1, length))
    began = time.perf_counter()
    state = m.prefill(ids)
    read = time.perf_counter()
    for token in range(tokens):
        m.step(ids[:, token], state)
    return read - began, (time.perf_counter() - read) / tokens, state.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=64, help="tokens behind the text")
    parser.add_argument("--rounds", type=int, default=2, help="at the longest length one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {form: model(form) for form in FORMS}
    for m in models.values():
        check(m)
    found = []
    for length in arguments.lengths:
        best = {form: (float("inf"), float("inf"), 0) for form in FORMS}
        for _ in range(arguments.rounds if length < max(arguments.lengths) else 1):
            for form, m in models.items():
                now = measure(m, length, arguments.tokens)
                best[form] = (min(best[form][0], now[0]), min(best[form][1], now[1]), now[2])
        teacher = best["softmax"]
        row = {
            "length": length,
            "seconds to read": {form: round(b[0], 3) for form, b in best.items()},
            "milliseconds a token": {form: round(1000 * b[1], 2) for form, b in best.items()},
            "megabytes of memory": {form: round(b[2] / 2**20, 2) for form, b in best.items()},
            "softmax takes, times": {
                form: {
                    "reading": round(teacher[0] / b[0], 2),
                    "a token": round(teacher[1] / b[1], 2),
                    "memory": round(teacher[2] / b[2], 2),
                }
                for form, b in best.items()
                if form != "softmax"
            },
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    if arguments.json:
        table = {"threads": arguments.threads, "torch": torch.__version__, "lengths": found}
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
