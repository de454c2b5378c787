"""Prefill and decoding of mamba-130m's shape with random weights on a CPU: ours, transformers, llama.cpp, one run.

    python benchmarks/language.py --threads 1 --out benchmarks/results/language_cpu_1thread.json

llama.cpp is measured where llama-cpp-python (and gguf, which writes the file) can be imported; its sources build with
``pip install llama-cpp-python gguf``. Every contender's logits after the prompt are compared with ours in float32
before anything is timed, and a wrong one is refused. Contenders take turns within a round; figures are the best and the
median round. The cost of smaller weights is the perplexity of one text under the demo model, decoded token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import zoo
from zoo_language.mamba import MambaLM
from zoo_language.scoring import score

SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50280, "pad_vocab_size_multiple": 1}
Contender = tuple[Callable[[], Tensor], Callable[[], object]]  # (prefill, giving the last logits; decode of one token)


def build() -> MambaLM:
    """Random weights. The projections back to the stream are enlarged, so that a wrong layer shows in the logits."""
    torch.manual_seed(0)
    model = MambaLM(**SHAPE).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.out_proj.weight.mul_(4)
    return model.requires_grad_(False)


def ours(model: MambaLM, ids: Tensor, weights: str) -> Contender:
    """weights "bfloat16" prefills in bfloat16 too; int8 weights are for decoding only."""
    reader = model
    if weights == "bfloat16":
        reader = MambaLM(**SHAPE).eval().requires_grad_(False)
        reader.load_state_dict(model.state_dict())
        reader.bfloat16()
    decoder = reader.fast_decoder(weights)
    state = reader.prefill(ids)
    return lambda: reader.prefill(ids).logits[0].float(), lambda: decoder.step(7, state)


def transformers_model(model: MambaLM, ids: Tensor) -> Contender:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=768, num_hidden_layers=24, vocab_size=50280, state_size=16, residual_in_fp32=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    peer = MambaForCausalLM(config).eval().requires_grad_(False)
    model.hf_format = True
    peer.load_state_dict(zoo.reference("mamba").to_reference(model.state_dict(), model=model), strict=False)
    peer.tie_weights()

    def prefill() -> Tensor:
        return peer(ids, use_cache=True, logits_to_keep=1).logits[0, -1].float()

    cache = peer(ids, use_cache=True, logits_to_keep=1).cache_params
    token = torch.tensor([[7]])
    return prefill, lambda: peer(token, cache_params=cache, use_cache=True)


def write_gguf(model: MambaLM, path: Path) -> None:
    """The model in llama.cpp's format, float32."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "mamba")
    inner = 2 * SHAPE["d_model"]
    writer.add_context_length(2**20)
    writer.add_embedding_length(SHAPE["d_model"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(SHAPE["n_layer"])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(16)
    writer.add_ssm_time_step_rank(48)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [f"<{i}>" for i in range(SHAPE["vocab_size"])]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["< 0"])
    writer.add_tensor("token_embd.weight", model.embedding.weight.numpy())
    writer.add_tensor("output_norm.weight", model.norm_f.weight.numpy())
    for i, layer in enumerate(model.layers):
        mixer, base = layer.mixer, f"blk.{i}."
        writer.add_tensor(base + "attn_norm.weight", layer.norm.weight.numpy())
        writer.add_tensor(base + "ssm_in.weight", mixer.in_proj.weight.numpy())
        writer.add_tensor(base + "ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1).contiguous().numpy())
        writer.add_tensor(base + "ssm_conv1d.bias", mixer.conv1d.bias.numpy())
        writer.add_tensor(base + "ssm_x.weight", mixer.x_proj.weight.numpy())
        writer.add_tensor(base + "ssm_dt.weight", mixer.dt_proj.weight.numpy())
        writer.add_tensor(base + "ssm_dt.bias", mixer.dt_proj.bias.numpy())
        writer.add_tensor(base + "ssm_a", (-mixer.A_log.exp()).numpy())
        writer.add_tensor(base + "ssm_d", mixer.D.numpy())
        writer.add_tensor(base + "ssm_out.weight", mixer.out_proj.weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: MambaLM, ids: Tensor, threads: int, folder: Path) -> Contender:
    import llama_cpp

    path = folder / "mamba.gguf"
    write_gguf(model, path)
    peer = llama_cpp.Llama(
        str(path), n_ctx=4096, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False,
        logits_all=False,
    )  # fmt: skip
    prompt = ids[0].tolist()

    def prefill() -> Tensor:
        peer.reset()
        peer._ctx.kv_cache_clear()
        peer.eval(prompt)
        pointer = llama_cpp.llama_get_logits_ith(peer._ctx.ctx, -1)
        return torch.tensor(pointer[: SHAPE["vocab_size"]])

    return prefill, lambda: peer.eval([7])


def check(name: str, found: Tensor, want: Tensor, limit: float) -> float:
    error = float((found - want).abs().max() / want.abs().max())
    if not error <= limit:
        raise SystemExit(f"{name}: logits differ by {error:.2g} of the largest, allowed {limit:.2g}; nothing is timed")
    return error


def timed(call: Callable[[], object], repeat: int) -> float:
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - began) / repeat


def perplexity_costs(tokens: int) -> dict[str, float]:
    """Perplexity a byte of the sample text under the demo model with each kind of weights."""
    import zoo
    from zoo_registry import package_path

    model = zoo.load("mamba2_micro.bible")
    text = package_path("zoo_language", "examples/hebrews_11.txt").read_bytes()[:tokens]
    return {
        w: score(model, list(text), text_bytes=len(text), start=10, decoder=model.fast_decoder(w)).perplexity
        for w in ("float32", "bfloat16", "int8")
    }


def machine(threads: int) -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded a round")
    parser.add_argument("--without", action="append", default=[], help="leave a contender out (repeatable)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    ids = torch.randint(0, SHAPE["vocab_size"], (1, options.prompt))
    notes: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Contender]] = {
            "ours float32": lambda: ours(model, ids, "float32"),
            "ours bfloat16": lambda: ours(model, ids, "bfloat16"),
            "ours int8": lambda: ours(model, ids, "int8"),
            "transformers float32": lambda: transformers_model(model, ids),
            "llama.cpp float32": lambda: llama_cpp(model, ids, options.threads, Path(folder)),
        }
        for name, make in makers.items():
            if name in options.without:
                continue
            try:
                contenders[name] = make()
            except ImportError as error:
                notes[name] = f"not measured: {error}"
        want = contenders["ours float32"][0]()
        limits = {"ours bfloat16": 5e-2}
        errors = {n: check(n, c[0](), want, limits.get(n, 1e-3)) for n, c in contenders.items()}
        times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in contenders}
        for _ in range(options.rounds):
            for name, (prefill, decode) in contenders.items():
                if name != "ours int8":  # its prefill is float32's
                    times[name]["prefill"].append(timed(prefill, 1))
                times[name]["decode"].append(timed(decode, options.tokens))
    rows = {
        name: {
            kind: {"best_ms": min(values) * 1e3, "median_ms": statistics.median(values) * 1e3}
            for kind, values in found.items()
            if values
        }
        for name, found in times.items()
    }
    ratios = {
        f"{kind}: {peer} / {name}": rows[peer][kind]["best_ms"] / rows[name][kind]["best_ms"]
        for peer in ("transformers float32", "llama.cpp float32")
        if peer in rows
        for name in rows
        if name.startswith("ours")
        for kind in rows[name]
    }
    result = {
        "command": f"python benchmarks/language.py --threads {options.threads} --prompt {options.prompt} "
        f"--rounds {options.rounds} --tokens {options.tokens}",
        "machine": machine(options.threads),
        "logit_errors": errors,
        "milliseconds": rows,
        "ratios_of_best": ratios,
        "demo_perplexity_a_byte": perplexity_costs(600),
        "notes": notes,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
