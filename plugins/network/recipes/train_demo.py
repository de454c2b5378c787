"""Train the demo classifier on generated traffic (see traffic.py) and measure it on captures it never saw.

    uv run python plugins/network/recipes/train_demo.py

writes the checkpoint, its class names and a sample capture into the plugin, and prints the figures of the card: those
of the model on captures of other seeds, and beside them those of two simple rules on the same flows (the usual port of
each protocol; the nearest class mean of the bytes).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import traffic
from safetensors.torch import save_file

import zoo
from zoo_network.captures import write_pcap
from zoo_network.data import FlowSet, read_folder
from zoo_network.flows import FlowBytes
from zoo_network.netmamba import NetMamba, NetMambaPretrain
from zoo_network.training import finetune, predict, pretrain, scores, start_from

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_network"
CLASSES = sorted(traffic.PROTOCOLS)


def flows_of(connections: int, seed: int) -> FlowSet:
    with tempfile.TemporaryDirectory() as folder:
        return read_folder(traffic.write_folder(folder, connections, seed), FlowBytes(), classes=CLASSES)


def by_port(flows: FlowSet) -> np.ndarray:
    """The class whose usual port is in the first packet; where there is none, the first class."""
    ports = flows.flows[:, 20:24].astype(int)
    pairs = ports[:, 0] * 256 + ports[:, 1], ports[:, 2] * 256 + ports[:, 3]
    found = np.zeros(len(flows), int)
    for i, name in enumerate(CLASSES):
        usual = traffic.PROTOCOLS[name][2]
        found[(pairs[0] == usual) | (pairs[1] == usual)] = i
    return found


def nearest_mean(train: FlowSet, flows: FlowSet) -> np.ndarray:
    means = np.stack([train.flows[train.labels == i].mean(0) for i in range(len(CLASSES))])
    x = flows.flows.astype(np.float32)
    return ((means**2).sum(1) - 2 * x @ means.T).argmin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=400, help="of each protocol, for training")
    parser.add_argument("--pretraining-steps", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()

    train, valid, test = (flows_of(n, s) for n, s in ((arguments.connections, 1), (60, 2), (150, 3)))
    print(f"{len(train)} training flows, {len(valid)} validation, {len(test)} test", flush=True)
    torch.manual_seed(arguments.seed)
    model = zoo.create("netmamba_micro")
    assert isinstance(model, NetMamba)
    sizes = {"embed_dim": model.embed_dim, "depth": model.depth, "byte_length": model.byte_length}
    masked = NetMambaPretrain(**sizes, decoder_embed_dim=32, decoder_depth=1, drop_path_rate=0.0)
    losses = pretrain(masked, train.flows, steps=arguments.pretraining_steps, batch_size=64, base_rate=8e-3)
    print(f"pre-training: loss {np.mean(losses[:20]):.3f} to {np.mean(losses[-20:]):.3f}", flush=True)
    start_from(model, masked)
    finetune(
        model,
        train,
        valid,
        epochs=arguments.epochs,
        batch_size=64,
        base_rate=1.2e-2,
        warmup_epochs=1,
        layer_decay=0.9,
        smoothing=0.05,
        seed=arguments.seed,
        report=lambda e: print(f"epoch {e.number:2} loss {e.loss:.3f} validation {e.accuracy:.4f}", flush=True),
    )
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in weights.items()})  # what is stored is what is measured
    found, per_class = scores(predict(model, test.flows), test.labels, CLASSES)
    others = {"usual ports": by_port(test), "nearest mean": nearest_mean(train, test)}
    rules = {name: float((guess == test.labels).mean()) for name, guess in others.items()}
    print(json.dumps({"test": found, "rules, accuracy": rules, "classes": per_class}, indent=1))
    if arguments.dry_run:
        return

    demo = PLUGIN / "demo"
    demo.mkdir(exist_ok=True)
    save_file(weights, demo / "netmamba_micro.generated.safetensors")
    (demo / "generated_classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    r = np.random.default_rng(4)
    packets = [p for name in CLASSES for p in traffic.connection(r, name, 1.7e9 + float(r.uniform(0, 2)))[:12]]
    write_pcap(demo / "sample.pcap", sorted(packets, key=lambda p: p[0]))


if __name__ == "__main__":
    main()
