"""The way of a published checkpoint, as `zoo ask` goes it: configuration, shards, tokenizer, picture, answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

import zoo
from zoo_multimodal.mmmamba import MmMamba
from zoo_multimodal.mmmamba_formats import arguments_of

sys.path.insert(0, str(Path(__file__).parents[1] / "registry"))
from hub_server import HubServer

MARKS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def tokenizer_files(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("what is this a cat a dog two red cats system user assistant\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {mark: size + i for i, mark in enumerate(MARKS)}
    return {
        "tokenizer.model": (folder / "tokenizer.model").read_bytes(),
        "added_tokens.json": json.dumps(added).encode(),
    }, size + len(MARKS)


def published(vocabulary):
    """config.json as transformers writes it, small, and the released weights in two shards."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
             "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5}  # fmt: skip
    first = {**sizes, "num_hidden_layers": 1, "layers_block_type": ["mamba2"], "image_size": 28, "patch_size": 14,
             "llm_vocab_size": vocabulary, "img_context_token_id": vocabulary - 1, "use_pixel_shuffle_proj": True,
             "pixel_shuffle_loc": "pre", "downsample_ratio": 0.5, "use_ls": False, "model_type": "mmMamba_embedding",
             "attention_bias": False, "special_token_maps": {}}  # fmt: skip
    second = {**sizes, "num_hidden_layers": 2, "layers_block_type": ["mha", "mamba2"], "vocab_size": vocabulary,
              "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False,
              "model_type": "mmMamba"}  # fmt: skip
    config = {
        "model_type": "mmMamba_chat",
        "embedding_config": first,
        "llm_config": second,
        "template": "internlm2-chat",
    }
    torch.manual_seed(0)
    model = MmMamba(**arguments_of(config)).eval()
    state = zoo.reference("mmmamba").to_reference(model.state_dict(), model=model)
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {
        name: save({k: state[k].contiguous().to(torch.bfloat16) for k in keys}, metadata={"format": "pt"})
        for name, keys in shards.items()
    }
    table = {"metadata": {}, "weight_map": {k: name for name, keys in shards.items() for k in keys}}
    return files | {
        "model.safetensors.index.json": json.dumps(table).encode(), "config.json": json.dumps(config).encode()
    }  # fmt: skip


def test_from_the_repository_to_an_answer(tmp_path):
    tokenizer, vocabulary = tokenizer_files(tmp_path)
    Image.new("RGB", (60, 30), (200, 30, 30)).save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "zoo.cli", "ask", "mmmamba_linear", str(tmp_path / "photo.png"), "what is this",
               "--system", "a cat", "--max-tiles", "4", "--max-new-tokens", "3", "--json"]  # fmt: skip
    with HubServer() as hub:
        hub.add("hustvl/mmMamba-linear", published(vocabulary) | tokenizer)
        env = hub.env(tmp_path / "home", OMP_NUM_THREADS="1", ZOO_PLUGINS="multimodal")
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["model"] == "mmmamba_linear.chat"
    assert found["tiles"] == 3  # two and the thumbnail
    assert found["tokens"] <= 3
