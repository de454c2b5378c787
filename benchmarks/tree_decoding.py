"""Tree decoding against plain decoding: tokens a second of the demo model with an n-gram draft, and what a pass costs.

    python benchmarks/tree_decoding.py --threads 2
    python benchmarks/tree_decoding.py --device cuda

The draft is an n-gram model of text that the target itself wrote at temperature 0.8 (from another opening than those
measured). Plain decoding is measured as ``model.step`` and, where they apply, as the fused CPU decoder and as CUDA
graphs; contenders take turns and must give the same tokens. The second part times one pass over STree's static tree of
18 nodes, and moving the state over four of them, at mamba2-130m's shape with random weights: what a pass must save to
pay. Figures are the best round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo_language.decode import decoder_for
from zoo_language.drafts import STATIC_TREE, ModelDraft, NGramDraft
from zoo_language.generation import Sampling, generate
from zoo_language.graphs import graph_decoder_for
from zoo_language.mamba import MambaLM
from zoo_language.tree_pass import TreePass

SHAPE: dict[str, Any] = {"d_model": 768, "n_layer": 24, "vocab_size": 50288, "layer": "Mamba2"}
OPENINGS = [b"And God said unto Moses, ", b"Blessed is the man that ", b"Now it came to pass in the days of "]


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def plain_steps(model: MambaLM, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by ``model.step`` alone."""
    state = model.prefill(torch.tensor([prompt], device=model.device))
    tokens = []
    for _ in range(count):
        assert state.logits is not None
        tokens.append(int(state.logits[0, : model.vocab_size].argmax()))
        model.step(torch.tensor([tokens[-1]], device=model.device), state)
    return tokens


def demo(device: str, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Tokens a second and tokens a pass of the demo model."""
    model = zoo.load("mamba2_micro", device=device)
    written: list[int] = []
    for seed in range(6):
        texts, _ = generate(
            model, [list(b"And ")], max_new_tokens=2000, sampling=Sampling(temperature=0.8, seed=seed),
        )  # fmt: skip
        written += texts[0].tokens
    draft = NGramDraft(order=8, nodes=16, depth=12).count(written)
    contenders: dict[str, Callable[[list[int]], list[int]]] = {
        "step": lambda prompt: plain_steps(model, prompt, count),
        "tree": lambda prompt: generate(model, [prompt], max_new_tokens=count, speculative=draft)[0][0].tokens,
    }
    if device == "cpu" and decoder_for(model) is not None:
        contenders["fused step"] = lambda prompt: generate(model, [prompt], max_new_tokens=count)[0][0].tokens
    if device == "cuda":
        contenders["CUDA graphs"] = lambda prompt: (
            generate(model, [prompt], max_new_tokens=count, cuda_graphs=True)[0][0].tokens
        )
    prompts = [list(opening) for opening in OPENINGS]
    for prompt in prompts:
        answers = {name: run(prompt) for name, run in contenders.items()}
        for name, tokens in answers.items():
            assert tokens == answers["step"], f"{name} gave other tokens than step"
    best = dict.fromkeys(contenders, float("inf"))

    def every(run: Callable[[list[int]], list[int]]) -> None:
        for prompt in prompts:
            run(prompt)

    for _ in range(rounds):
        for name, run in contenders.items():
            best[name] = min(best[name], seconds(partial(every, run), device))
    passes = [generate(model, [p], max_new_tokens=count, speculative=draft)[0][0].passes for p in prompts]
    total = count * len(prompts)
    return {
        "tokens a second": {name: total / value for name, value in best.items()},
        "tokens a pass": {"tree": total / sum(passes)},
    }


def cost(device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a step and of a pass over the static tree at mamba2-130m's shape."""
    torch.manual_seed(0)
    model = MambaLM(**SHAPE, pad_vocab_size_multiple=16).eval().requires_grad_(False).to(device)
    state = model.prefill(torch.randint(0, 50000, (1, 64), device=device))
    draft = ModelDraft(MambaLM(16, 1, 50288, layer="Mamba2", ssm={"d_state": 8, "headdim": 16}).eval().to(device))
    draft.start([1])
    tree = draft.propose(len(STATIC_TREE))
    assert len(tree.tokens) == 18
    verify = TreePass(model)

    def passed() -> None:
        verify(tree, state)
        verify.accept([0, 1, 6, 10], state)

    runs: dict[str, Callable[[], object]] = {
        "step": lambda: model.step(torch.tensor([3], device=device), state),
        "tree": passed,
    }
    fused = decoder_for(model) if device == "cpu" else None
    if fused is not None:
        runs["fused step"] = lambda: fused.step(3, state)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 2):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, device))
    found = {name: 1e3 * value for name, value in best.items()}
    graphed = graph_decoder_for(model) if device == "cuda" else None
    if graphed is not None:
        current = graphed.adopt(model.prefill(torch.randint(0, 50000, (1, 64), device=device)))
        token = torch.tensor([3], device=device)
        times = [seconds(lambda: graphed.step(token, current), device) for _ in range(rounds + 5)]
        found["CUDA graphs"] = 1e3 * min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, help="Write the figures here as JSON.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads",
        "demo model, n-gram draft": demo(options.device, options.rounds, options.tokens),
        "mamba2-130m's shape, milliseconds": cost(options.device, options.rounds),
    }
    text = json.dumps(found, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
