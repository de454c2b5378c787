"""Train EEGDM's demo on generated EEG (see eeg.py) and measure it on subjects it never saw.

    uv run python plugins/neuro/recipes/train_eeg_demo.py

pre-trains a small backbone by denoising, fine-tunes the latent fusion transformer on it, writes the checkpoint, its
class names and a sample recording (a new subject, 2.5 s of each kind) into the plugin, and prints the figures of the
card: those of the model, and beside them those of a logistic regression on the logarithms of band powers (5 bands,
every channel) of the same windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import eeg
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import zoo
from zoo_neuro.eegdm.backbone import DiffusionBackbone
from zoo_neuro.eegdm.data import WindowSet, windows
from zoo_neuro.eegdm.fusion import EEGClassifier
from zoo_neuro.eegdm.recordings import write_recording
from zoo_neuro.eegdm.training import finetune, measures, predict, pretrain

PLUGIN = Path(__file__).parents[1] / "src" / "zoo_neuro"
BANDS = ((0.5, 4), (4, 8), (8, 13), (13, 30), (30, 40))


def windows_of(model: EEGClassifier, subjects: int, seed: int, seconds: float = 20.0) -> WindowSet:
    """Windows of ``subjects`` new subjects, a recording of each kind from each."""
    r = np.random.default_rng(seed)
    x, labels, whose = [], [], []
    for number in range(subjects):
        who = eeg.subject(r)
        for label, kind in enumerate(eeg.KINDS):
            own, _ = windows(eeg.recording(r, kind, who, seconds), model.preparation)
            x.append(own)
            labels += [label] * len(own)
            whose += [f"S{seed}x{number}"] * len(own)
    return WindowSet(np.concatenate(x), np.array(labels), list(eeg.KINDS), np.array(whose))


def band_powers(x: np.ndarray) -> np.ndarray:
    """(n, channels, samples) to the logarithms of the bands' powers, (n, channels * bands)."""
    power = np.abs(np.fft.rfft(x * np.hanning(x.shape[-1]), axis=-1)) ** 2
    f = np.fft.rfftfreq(x.shape[-1], 1 / eeg.SFREQ)
    bands = [np.log(power[..., (f >= low) & (f < high)].mean(-1) + 1e-9) for low, high in BANDS]
    return np.concatenate(bands, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=48, help="for training")
    parser.add_argument("--pretraining-steps", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = zoo.create("eegdm_micro")
    assert isinstance(model, EEGClassifier)
    train, valid, test = (windows_of(model, n, s) for n, s in ((arguments.subjects, 1), (12, 2), (24, 3)))
    print(f"{len(train)} training windows, {len(valid)} validation, {len(test)} test", flush=True)

    backbone: DiffusionBackbone = model.extractor.model.requires_grad_(True)
    losses = pretrain(
        backbone, train.x, steps=arguments.pretraining_steps, batch_size=64, rate=3e-3, seed=arguments.seed,
        report=lambda i, loss: None if (i + 1) % 200 else print(f"step {i + 1} loss {loss:.3f}", flush=True),
    )  # fmt: skip
    print(f"pre-training: loss {np.mean(losses[:50]):.3f} to {np.mean(losses[-200:]):.3f}", flush=True)
    backbone.requires_grad_(False)
    finetune(
        model, train, valid, epochs=arguments.epochs, top_rate=5e-3, averaging={"beta": 0.99, "every": 1}, patience=8,
        seed=arguments.seed,
        report=lambda e: print(f"epoch {e.number:2} loss {e.loss:.3f} kappa {e.measures['kappa']:.4f}", flush=True),
    )  # fmt: skip
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})  # what is stored
    shares = predict(model, test.x)
    baseline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    baseline.fit(band_powers(train.x), train.labels)
    rest = measures(baseline.predict_proba(band_powers(test.x)), test.labels)
    by_class = {
        kind: float((shares.argmax(1) == i)[test.labels == i].mean()) for i, kind in enumerate(eeg.KINDS)
    }  # fmt: skip
    print(json.dumps({"test": measures(shares, test.labels), "band powers": rest, "recall": by_class}, indent=1))
    if arguments.dry_run:
        return
    demo = PLUGIN / "demo"
    demo.mkdir(exist_ok=True)
    save_file(weights, demo / "eegdm_micro.generated.safetensors")
    (demo / "eeg_kinds.txt").write_text("\n".join(eeg.KINDS) + "\n", encoding="utf-8")
    r = np.random.default_rng(5)  # a subject as most: five of its six windows are read as what they are
    write_recording(eeg.sequence(r, eeg.KINDS, eeg.subject(r)), demo / "sample.edf")


if __name__ == "__main__":
    main()
