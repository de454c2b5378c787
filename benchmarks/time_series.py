"""SpaceTime on a CPU: companion kernels, the forecast and a training step, against the original's way in torch.

    python benchmarks/time_series.py                  # 2 threads
    python benchmarks/time_series.py --threads 1 --rounds 31

The peer is the definition as the original computes it, in the same run: kernels by repeated squaring of the matrix,
convolutions by torch.fft over twice the length, the decoder's states of every step of the window by one such
convolution of which the last is used, the rollout of every sample's states by repeated squaring. For kernels the
original's own fast form (on the unit circle; its model does not call it) is timed as well. Nothing is timed before its
result agreed with the peer's. TSM2's peer is the same network on zoo_kernels' reference operators. Contenders take
turns; figures are the best round.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zoo
import zoo_kernels
from zoo_time_series._base import affine_of
from zoo_time_series.companion import companion_kernel, companion_krylov, companion_matrix, krylov
from zoo_time_series.spacetime import SpaceTime, spacetime
from zoo_time_series.ssm import ClosedLoopCompanionSSM, CompanionSSM, normalised


def best(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each in seconds; they take turns."""
    found = dict.fromkeys(contenders, math.inf)
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def agree(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= tolerance:
        raise SystemExit(f"{what}: relative difference {gap:.2g}; nothing is timed")


# -- the peer: the definition, as the original's model computes it ----------------------------------------------------


def convolve(u: Tensor, kernels: Tensor) -> Tensor:
    """(batch, length, D) with (D, length)."""
    n = 2 * u.shape[1]
    spectra = torch.fft.rfft(u.transpose(1, 2), n=n) * torch.fft.rfft(kernels[:, : u.shape[1]], n=n)
    return torch.fft.irfft(spectra, n=n)[..., : u.shape[1]].transpose(1, 2)


def peer_ssm(ssm: CompanionSSM, u: Tensor) -> Tensor:
    A = companion_matrix(normalised(ssm.a, ssm.norm_order))
    y = convolve(u, ssm.spread(krylov(u.shape[1], A, ssm.b, ssm.c)))
    return y + u * ssm.skip if ssm.skip_connection else y


def peer_decoder(ssm: ClosedLoopCompanionSSM, u: Tensor, horizon: int) -> Tensor:
    a, b, c, k = (normalised(x, ssm.norm_order) for x in (ssm.a, ssm.b, ssm.c, ssm.k))
    A, n = companion_matrix(a), 2 * u.shape[1]
    responses = krylov(u.shape[1], A, ssm.b).transpose(1, 2)  # (D, length, d)
    spectra = torch.fft.rfft(u.transpose(1, 2), n=n)[..., None] * torch.fft.rfft(responses, n=n, dim=1)
    states = torch.fft.irfft(spectra, n=n, dim=2)[:, :, : u.shape[1]]
    rolled = krylov(horizon, A + b[..., :, None] * k[..., None, :], states[:, :, -1])
    return torch.einsum("bdnl,dn->bld", rolled, c)


def peer_forecast(model: SpaceTime, series: Tensor) -> Tensor:
    affine = affine_of(series, model.data_transform, model.lag)
    z = model.embedding(affine(series))
    for block in model.encoder.blocks:
        identity = isinstance(block.pre, nn.Identity)
        filtered = z if identity else convolve(z, block.pre.spread(block.pre.kernels(z.shape[1])))
        z = block.finish(peer_ssm(block.ssm, filtered), filtered, z)
    return affine.back(model.output(peer_decoder(model.decoder.blocks.ssm, z, model.horizon)))


# -- what is timed -----------------------------------------------------------------------------------------------------


def kernels(rounds: int) -> None:
    print("companion kernels, 128 of d = 64: repeated squaring / ours, the original's fast form / ours")
    for length in (96, 336, 1024, 4096):
        torch.manual_seed(0)
        a = normalised(torch.randn(128, 64), 1)
        b, c = torch.randn(128, 64), torch.randn(128, 64)
        agree(companion_kernel(length, a, b, c), krylov(length, companion_matrix(a), b, c), "kernels")
        with torch.inference_mode():
            spent = best(
                {
                    "ours": lambda: companion_kernel(length, a, b, c),  # noqa: B023 - called at once
                    "squaring": lambda: krylov(length, companion_matrix(a), b, c),  # noqa: B023
                    "circle": lambda: companion_krylov(length, a, b, c),  # noqa: B023
                },
                rounds,
            )
        ours = spent["ours"]
        print(
            f"  length {length:5}: {spent['squaring'] / ours:6.1f} {spent['circle'] / ours:6.1f}"
            f"   (ours {1e3 * ours:.2f} ms)"
        )


def network(rounds: int) -> None:
    print("spacetime_ett_720 (lag 336, horizon 720): peer / ours")
    torch.manual_seed(0)
    model = spacetime(dropout=0.0)
    for name, p in model.named_parameters():
        if name.endswith("ssm.k"):
            p.data.mul_(0.1)  # trained decoders do not grow without bound
    for batch in (1, 8, 50):
        series, target = torch.randn(batch, 336, 1), torch.randn(batch, 720, 1)

        def step(forecast: Callable[[Tensor], Tensor], series=series, target=target) -> None:
            model.zero_grad()
            (forecast(series) - target).square().mean().sqrt().backward()

        model.eval()
        with torch.inference_mode():
            agree(model(series), peer_forecast(model, series), "forecasts", 1e-3)
            spent = best(
                {
                    "ours": lambda series=series: model(series),
                    "peer": lambda series=series: peer_forecast(model, series),
                },
                rounds if batch < 50 else max(rounds // 4, 3),
            )
        model.train()
        learned = best(
            {"ours": lambda: step(model), "peer": lambda: step(lambda x: peer_forecast(model, x))},
            max(rounds // (2 if batch < 50 else 6), 2),
        )
        print(
            f"  batch {batch:3}: forecast {spent['peer'] / spent['ours']:6.1f} (ours {1e3 * spent['ours']:.1f} ms)"
            f"   training step {learned['peer'] / learned['ours']:5.1f} (ours {1e3 * learned['ours']:.0f} ms)"
        )


def stream(rounds: int) -> None:
    torch.manual_seed(0)
    model = spacetime(dropout=0.0).eval()
    history, new = torch.randn(1, 336, 1), torch.randn(1, 1)
    with torch.inference_mode():
        state = model.init_stream(history)
        spent = best(
            {
                "step": lambda: model.observe(new, state),
                "roll": lambda: model.roll_out(state),
                "whole": lambda: model(history),
            },
            rounds,
        )
    together = spent["step"] + spent["roll"]
    print(
        f"a new value and a new forecast of 720 steps from a stream: {spent['whole'] / together:.2f} times as fast as "
        f"from the window (the step alone {1e3 * spent['step']:.2f} ms)"
    )


def tsm2(rounds: int) -> None:
    print("tsm2_96 (look-back 512, 7 variates): the reference operators (zoo_kernels.backend) / ours")
    torch.manual_seed(0)
    model = zoo.create("tsm2_96", dropout=0.0).eval()
    for batch in (1, 16):
        series = torch.randn(batch, 512, 7)

        def reference(series: Tensor = series) -> Tensor:
            with zoo_kernels.backend("reference"):
                return model(series)

        with torch.inference_mode():
            agree(model(series), reference(), "forecasts")
            spent = best({"ours": lambda series=series: model(series), "peer": reference}, rounds)
        print(f"  batch {batch:3}: {spent['peer'] / spent['ours']:6.1f} (ours {1e3 * spent['ours']:.1f} ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["kernels", "network", "stream", "tsm2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32, best of {arguments.rounds} rounds")
    for what in arguments.what:
        {"kernels": kernels, "network": network, "stream": stream, "tsm2": tsm2}[what](arguments.rounds)


if __name__ == "__main__":
    main()
