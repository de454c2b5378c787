"""Bio-xLSTM's networks on a CPU against the package xlstm and against the reference operators.

    uv run python benchmarks/biology.py --threads 2 --repeat 5 --save

``xlstm`` (PyPI, its plain torch form: parallel mLSTM, sequential sLSTM) gets the same weights and the same tokens, and
its logits are compared with ours before anything is timed; without the package that part is left out. "Reference
operators" is our network on each operator's definition in torch (``zoo_kernels.backend("reference")``). Runs alternate,
the least time of each counts, and every figure is a ratio of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
import zoo_kernels
from zoo_biology.bio_xlstm import Adapter

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0] if models else name
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def least(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """The least time of each, in seconds; they take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(repeat + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first one warms caches
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def peer(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module | None:
    """The same network of the package xlstm, or None where it is not installed."""
    try:
        from dacite import Config, from_dict
        from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig
    except ImportError as error:
        print(f"xlstm is left out: {error}; pip install xlstm dacite")
        return None
    model = xLSTMLMModel(from_dict(data_class=xLSTMLMModelConfig, data=config, config=Config(strict=True)))
    model.load_state_dict(state)
    return model.eval()


def nx_config(slstm_at: list[int], context: int) -> dict[str, Any]:
    return {
        "vocab_size": 37, "context_length": context, "num_blocks": 9, "embedding_dim": 512, "slstm_at": slstm_at,
        "mlstm_block": {"mlstm": {"num_heads": 8}},
        "slstm_block": {
            "slstm": {"backend": "vanilla", "num_heads": 8, "dtype": "float32"},
            "feedforward": {"proj_factor": 1.3, "act_fn": "gelu"},
        },
    }  # fmt: skip


def reference(run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with zoo_kernels.backend("reference"):
            return run()

    return inside


def generation(name: str, at: list[int], shapes: list[tuple[int, int]], repeat: int) -> list[dict[str, Any]]:
    """Whole sequences and decoding steps of a Chem-xLSTM."""
    torch.manual_seed(0)
    model = zoo.create(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial gates and recurrences are zero, and would hide errors
            parameter.add_(0.02 * torch.randn_like(parameter))
    adapter = Adapter()
    model.reference_prefix, model.reference_cuda = "", False
    rows = []
    for batch, length in shapes:
        ids = torch.randint(0, 37, (batch, length))
        theirs = peer(nx_config(at, length), adapter.to_reference(model.state_dict(), model=model))
        runs: dict[str, Callable[[], Any]] = {"ours": partial(model, ids)}
        if theirs is not None:
            difference = (theirs(ids) - model(ids)).abs().max() / model(ids).abs().max()
            assert difference < 1e-3, f"{name}: xlstm's logits differ by {difference:.1e}"
            runs["xlstm"] = partial(theirs, ids)
        if length <= 512:
            runs["reference operators"] = reference(runs["ours"])
        rows.append(row(f"{name}, {batch} x {length}", least(runs, repeat)))
        if length != shapes[0][1]:
            continue

        def ours(ids: Tensor = ids) -> None:
            state = model.init_state(len(ids))
            for t in range(24):
                model.step(ids[:, t], state)

        steps: dict[str, Callable[[], Any]] = {"ours": ours}
        if theirs is not None:

            def other(ids: Tensor = ids, theirs: Any = theirs) -> None:
                state = None
                for t in range(24):
                    _, state = theirs.step(ids[:, t : t + 1], state)

            steps["xlstm"] = other
        rows.append(row(f"{name}, 24 steps of {batch}", least(steps, repeat)))
    return rows


def plain(name: str, batch: int, length: int, high: int, repeat: int) -> dict[str, Any]:
    """Whole sequences of a model against the reference operators."""
    torch.manual_seed(0)
    model = zoo.create(name).eval()
    ids = torch.randint(0, high, (batch, length))
    runs: dict[str, Callable[[], Any]] = {
        "ours": partial(model, ids),
        "reference operators": reference(partial(model, ids)),
    }
    return row(f"{name}, {batch} x {length}", least(runs, repeat))


def row(what: str, times: dict[str, float]) -> dict[str, Any]:
    ratios = {name: round(t / times["ours"], 2) for name, t in times.items() if name != "ours"}
    shown = ", ".join(f"{ratio:.2f} times as fast as {name}" for name, ratio in ratios.items())
    print(f"{what}: {times['ours'] * 1000:.1f} ms, {shown}", flush=True)
    return {"what": what, "milliseconds": round(times["ours"] * 1000, 2), "times as fast as": ratios}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = generation("chem_xlstm_15m", [], [(8, 100), (1, 2048)], options.repeat)
    rows += generation("chem_xlstm_slstm", [1], [(8, 100)], options.repeat)
    rows.append(plain("dna_xlstm_1k_slstm", 1, 1024, 12, options.repeat))
    rows.append(plain("protxlstm_26m", 1, 512, 38, options.repeat))
    if options.save:
        path = RESULTS / "biology.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
