"""Speech and sound on a CPU: real-time factor, an hour in constant memory, SaShiMi's steps, S4's convolution.

    python benchmarks/audio.py                 # everything that is quick
    python benchmarks/audio.py hour            # an hour of audio from a file, with the peak of memory

Peers, all in the same run: for SaShiMi's step the original's way of stepping (its dense matrix mode, and a cache-free
forward over the last second), and a dense WaveNet-size stack in torch, stepped with ring buffers; for S4's convolution
mode the plain one (kernel by its definition, then torch.fft). Every result is compared with its definition before it is
timed. Contenders take turns within a round; figures are the best round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

import zoo
from zoo.layers.s4 import S4Kernel
from zoo.layers.s4d import S4DKernel
from zoo_audio.metrics import error_rates
from zoo_audio.sashimi_step import Stepper
from zoo_kernels import long_conv


def best(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each in seconds; they take turns."""
    found = dict.fromkeys(contenders, math.inf)
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


# -- speech ------------------------------------------------------------------------------------------------------------


def babble(seconds: float) -> tuple[np.ndarray, str]:
    """The package's sample recordings, one after another, as often as it takes to fill ``seconds``; what they say."""
    from zoo_registry import package_path

    lines = package_path("zoo_audio", "examples/transcripts.tsv").read_text(encoding="utf-8").splitlines()
    names, texts = zip(*(line.split("\t") for line in lines), strict=True)
    once = np.concatenate(
        [soundfile.read(package_path("zoo_audio", f"examples/{n}"), dtype="float32")[0] for n in names]
    )
    times = math.ceil(seconds * 16000 / len(once))
    return np.tile(once, times), " ".join([*texts] * times)


def speech(rounds: int) -> dict[str, object]:
    """Real-time factors: of the demo and of the base size (random weights), whole and in pieces of 0.32 s."""
    found: dict[str, object] = {}
    audio, _ = babble(20.0)
    seconds = len(audio) / 16000
    pipe = zoo.pipeline("samba_asr_micro")
    whole = pipe((audio, 16000))

    def streamed() -> str:
        stream = pipe.recogniser()
        for start in range(0, len(audio), 5120):
            stream.push(audio[start : start + 5120])
        stream.finish()
        return stream.text

    assert streamed() == whole.text, "the stream must write what the whole does"
    times = best({"whole": lambda: pipe((audio, 16000)), "pieces of 0.32 s": streamed}, rounds)
    found["samba_asr_micro, real-time factor"] = {k: round(v / seconds, 5) for k, v in times.items()}
    base = zoo.create("samba_asr_base_streaming").eval()
    features = torch.randn(1, 1000, 80)
    with torch.inference_mode():
        times = best({"encoder and CTC, 10 s": lambda: base(features)}, max(rounds // 2, 1))
    name = "samba_asr_base_streaming (random weights), real-time factor"
    found[name] = {k: round(v / 10, 4) for k, v in times.items()}
    return found


def hour() -> dict[str, object]:
    """An hour from a flac file: time, and how much the peak of memory grows from the first minute to the last."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hour.flac"
        minute, said = babble(60.0)
        with soundfile.SoundFile(path, "w", 16000, 1) as file:
            for _ in range(60):
                file.write(minute)
        short = Path(folder) / "minute.flac"
        soundfile.write(short, minute, 16000)
        pipe = zoo.pipeline("samba_asr_micro")
        pipe(short)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = pipe(path)
        rates = error_rates([" ".join([said] * 60)], [answer.text])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "an hour of flac": {
            "seconds": round(answer.seconds), "real-time factor": round(answer.real_time_factor, 5),
            "word error rate, percent": round(100 * rates.wer, 2), "peak memory after a minute, MB": before // 1024,
            "peak memory after the hour, MB": after // 1024,
        }
    }  # fmt: skip


# -- SaShiMi's steps ---------------------------------------------------------------------------------------------------


class WaveNet(nn.Module):
    """A dense WaveNet in step mode: ``blocks`` times ten dilated layers of ``width`` channels with ring buffers, skips
    of ``skip`` channels, 256 outputs (van den Oord et al., arXiv 1609.03499). Random weights."""

    def __init__(self, width: int = 64, skip: int = 256, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.dilations = [2**i for _ in range(blocks) for i in range(10)]
        self.gates = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in self.dilations)
        self.outs = nn.ModuleList(nn.Linear(width, width + skip) for _ in self.dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(skip, skip), nn.ReLU(), nn.Linear(skip, 256))
        self.width, self.skip = width, skip

    def init_state(self) -> list[Tensor]:
        return [torch.zeros(d, self.width) for d in self.dilations]

    def step(self, token: Tensor, state: list[Tensor], t: int) -> Tensor:
        x, total = self.embed(token), 0
        for dilation, ring, gate, out in zip(self.dilations, state, self.gates, self.outs, strict=True):
            old = ring[t % dilation].clone()
            ring[t % dilation] = x[0]
            a, b = gate(torch.cat([old[None], x], 1)).chunk(2, 1)
            both = out(torch.tanh(a) * torch.sigmoid(b))
            x = x + both[:, : self.width]
            total = total + both[:, self.width :]
        return self.head(total)


@torch.inference_mode()
def sashimi(rounds: int) -> dict[str, object]:
    """Samples a second of sashimi_sc09's size at batch 1, random weights."""
    # Parameters made in inference mode have no version, so what depends on them would be computed anew at every step.
    with torch.inference_mode(False):
        model, wavenet = zoo.create("sashimi_sc09").eval(), WaveNet().eval()
    tokens = torch.randint(0, 256, (64,))
    stepper = Stepper(model, 1)
    whole = model(tokens[None])[0]
    made = torch.stack([stepper.step(t[None])[0] for t in tokens])
    error = float((made - whole).abs().max() / whole.abs().max())
    assert error < 1e-3, f"the stepper differs from the whole by {error:.2g}"
    samples = 400
    kernels = [m for m in model.modules() if isinstance(m, S4Kernel)]

    def layers(mode: str) -> Callable[[], None]:
        def run() -> None:
            for kernel in kernels:
                kernel.setup_step(mode)
            state = model.init_state(1)
            model.step(tokens[:1], state)
            began = time.perf_counter()
            for i in range(count):
                model.step(tokens[i % 64][None], state)
            spent[mode] = min(spent.get(mode, math.inf), (time.perf_counter() - began) / count)

        count = samples if mode == "linear" else 32
        return run

    spent: dict[str, float] = {}

    def fast() -> None:
        for i in range(samples):
            stepper.step(tokens[i % 64][None])

    def dense() -> None:
        state = wavenet.init_state()
        for i in range(samples):
            wavenet.step(tokens[i % 64][None], state, i)

    times = best({"stepper": fast, "wavenet": dense, "linear": layers("linear"), "dense": layers("dense")}, rounds)
    rates = {
        "zoo, Stepper (what zoo generate-audio runs)": samples / times["stepper"],
        "dense WaveNet of 40 layers, torch, step mode": samples / times["wavenet"],
        "SaShiMi layer by layer, linear steps": 1 / spent["linear"],
        "SaShiMi layer by layer, dense steps (the original's default)": 1 / spent["dense"],
    }
    ours = rates["zoo, Stepper (what zoo generate-audio runs)"]
    return {
        "samples a second, batch 1": {k: round(v) for k, v in rates.items()},
        "zoo over WaveNet": round(ours / rates["dense WaveNet of 40 layers, torch, step mode"], 2),
        "zoo over the original's dense steps": round(
            ours / rates["SaShiMi layer by layer, dense steps (the original's default)"], 2
        ),
        "parameters": {
            "sashimi_sc09": sum(p.numel() for p in model.parameters()),
            "wavenet": sum(p.numel() for p in wavenet.parameters()),
        },
        "largest difference from the whole": error,
    }


# -- S4's convolution --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def convolution(rounds: int) -> dict[str, object]:
    """Kernel and convolution of one layer, H 64, N 32, L 4096, batch 8, against the plain form with torch.fft."""
    H, L, B = 64, 4096, 8
    found: dict[str, object] = {}
    x = torch.randn(B, L, H)
    for name, kernel in (
        ("S4 (DPLR)", S4Kernel(H, d_state=64, l_max=L)), ("S4D", S4DKernel(H, d_state=64, init="diag-lin")),
    ):  # fmt: skip
        if isinstance(kernel, S4Kernel):
            kernel(L)  # lays the kernel's length down
        D = torch.randn(1, H)

        def ours(kernel=kernel, D=D) -> Tensor:
            return long_conv(x, kernel(L)[0], D)[0].flatten(2)

        def plain(kernel=kernel, D=D) -> Tensor:
            return plainly(x, plain_dplr(kernel, L) if isinstance(kernel, S4Kernel) else plain_s4d(kernel, L), D)

        a, b = ours(), plain()
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 2e-3, f"{name}: the two differ by {error:.2g}"
        times = best({"zoo": ours, "torch.fft": plain}, rounds)
        found[f"{name}, kernel and convolution"] = {
            "zoo, ms": round(1000 * times["zoo"], 1), "torch.fft plainly, ms": round(1000 * times["torch.fft"], 1),
            "times as fast": round(times["torch.fft"] / times["zoo"], 1), "difference": error,
        }  # fmt: skip
    k = kernel(L)[0]
    times = best({"zoo": lambda: long_conv(x, k, D), "torch.fft": lambda: plainly(x, k[0], D)}, 3 * rounds)
    found["the convolution alone, times as fast"] = round(times["torch.fft"] / times["zoo"], 2)
    return found


def plainly(x: Tensor, k: Tensor, D: Tensor) -> Tensor:
    """x (batch, length, H) with kernels k (H, length) by torch.fft, twice as long so that nothing wraps."""
    L, n = x.shape[1], 2 * x.shape[1]
    y = torch.fft.irfft(torch.fft.rfft(x.transpose(1, 2), n=n) * torch.fft.rfft(k, n=n), n=n)[..., :L]
    return (y + D[0][:, None] * x.transpose(1, 2)).transpose(1, 2)


def plain_s4d(kernel: S4DKernel, L: int) -> Tensor:
    """K[l] = 2 Re sum C dB exp(l dt A), all powers at once."""
    log_dA, dB, C = kernel.discrete()
    powers = torch.exp(log_dA.to(torch.complex64)[..., None] * torch.arange(L))
    return 2 * torch.einsum("hn,hnl->hl", (C[0] * dB).to(torch.complex64), powers).real


def plain_dplr(kernel: S4Kernel, L: int) -> Tensor:
    """The generating function at the roots of unity by full Cauchy matrices (arXiv 2111.00396, algorithm 1)."""
    dt, A, B, C = kernel.system()
    P = kernel.low_rank()
    w = torch.exp(-2j * math.pi * torch.arange(L // 2 + 1) / L)
    z = 2 * (1 - w) / (1 + w)
    v = torch.stack([torch.stack([B[0] * C[0], B[0] * P[0].conj()]), torch.stack([P[0] * C[0], P[0] * P[0].conj()])])
    v, dtA = v * dt, dt * A
    r = (v[..., None] / (z - dtA[..., None])).sum(-2) + (v.conj()[..., None] / (z - dtA.conj()[..., None])).sum(-2)
    k = (r[0, 0] - r[0, 1] * r[1, 0] / (1 + r[1, 1])) * 2 / (1 + w)
    return torch.fft.irfft(k, n=L)


PARTS: dict[str, Callable[[int], dict[str, object]]] = {
    "speech": speech, "sashimi": sashimi, "convolution": convolution, "hour": lambda _: hour(),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speech", "sashimi", "convolution"], choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
        "torch": torch.__version__,
    }
    for part in arguments.parts:
        figures[part] = PARTS[part](arguments.rounds)
        print(json.dumps({part: figures[part]}, indent=1), flush=True)
    if arguments.out is not None:
        kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps(kept | figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
