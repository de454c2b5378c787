"""HiPPO matrices, their normal-plus-low-rank form, and the initialisations of S4, S4D and S5 made from them.

Everything is computed in numpy float64 (so that models build on any device, the meta device included).
Source: Gu et al., "HiPPO", arXiv 2008.07669; "How to Train Your HiPPO", arXiv 2206.12037; "S4D", arXiv 2206.11893;
state-spaces/s4 ``models/s4/s4.py`` (``transition``, ``rank_correction``, ``nplr``, ``dplr``).
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray

MEASURES = ("legs", "legt", "fout")
DIAGONAL = ("lin", "inv", "inv2", "quad", "real", "legs", "rand")
COMBINATIONS = {
    "hippo": ("legs", "fout"),
    "diag": ("diag-inv", "diag-lin"),
    "all": ("legs", "fout", "diag-inv", "diag-lin"),
}
_SAME = {
    "fourier": "fout", "linear": "lin", "inverse": "inv", "inverse2": "inv2", "quadratic": "quad", "hippo": "legs",
    "random": "rand",
}  # fmt: skip


def _measure(name: str) -> str:
    name = _SAME.get(name, name)
    if name not in MEASURES:
        raise ValueError(f"HiPPO measure {name!r} is not known; expected one of {', '.join(MEASURES)}")
    return name


def transition(measure: str, N: int) -> tuple[Array, Array]:
    """A (N, N) and B (N, 1) of the measure: "legs" (scaled Legendre), "legt" (translated), "fout" (Fourier)."""
    measure = _measure(measure)
    n = np.arange(N, dtype=np.float64)
    if measure == "legs":
        r = np.sqrt(2 * n + 1)
        A = -np.tril(np.outer(r, r), -1) - np.diag(n + 1)
        return A, r[:, None]
    if measure == "legt":
        r = np.sqrt(2 * n + 1)
        sign = np.where(n[:, None] < n[None], (-1.0) ** (n[:, None] - n[None]), 1.0)
        return -0.5 * sign * np.outer(r, r), 0.5 * r[:, None]
    _even(N, "fout")
    A = np.zeros((N, N))
    k = np.arange(N // 2)
    A[2 * k, 2 * k + 1] = -np.pi * k
    A[2 * k + 1, 2 * k] = np.pi * k
    B = np.where(n % 2 == 0, math.sqrt(2.0), 0.0)
    B[0] = 1.0
    return A - np.outer(B, B), B[:, None]


def _even(N: int, what: str) -> None:
    if N < 2 or N % 2:
        raise ValueError(f"{what} needs an even state size of at least 2; got {N}")


def rank_correction(measure: str, N: int, rank: int = 1) -> Array:
    """P (rank, N) such that A + sum_r P_r P_r^T is normal; rows beyond the rank of the measure are zero."""
    measure = _measure(measure)
    n = np.arange(N, dtype=np.float64)
    if measure == "legs":
        P = np.sqrt(n + 0.5)[None]
    elif measure == "legt":
        r = np.sqrt(1 + 2 * n) * 2**-0.5
        P = np.stack([np.where(n % 2 == 1, r, 0.0), np.where(n % 2 == 0, r, 0.0)])
    else:
        P = transition("fout", N)[1].T
    if rank < len(P):
        raise ValueError(f"the low-rank part of {measure!r} has rank {len(P)}; got rank={rank}")
    return np.concatenate([P, np.zeros((rank - len(P), N))])


def nplr(measure: str, N: int, rank: int = 1, B_clip: float | None = 2.0) -> tuple[Array, Array, Array, Array]:
    """Normal plus low rank: W (N/2,), P (rank, N/2), B (N/2,) complex, V (N, N/2), with A = V (W - P P^*) V^*.

    One of each conjugate pair is kept, imaginary parts not positive and ascending; the imaginary part of B is clipped
    to [-B_clip, B_clip]. Eigenvectors are defined up to a phase, which cancels in any use of the whole.
    """
    _even(N, "the normal-plus-low-rank form")
    A, B = transition(measure, N)
    P = rank_correction(measure, N, rank)
    AP = A + np.einsum("rm,rn->mn", P, P)
    im, V = np.linalg.eigh(-1j * AP)
    W = np.mean(np.diag(AP)) + 1j * im
    keep = np.argsort(im, kind="stable")[: N // 2]
    W, V = W[keep], V[:, keep]
    if abs(W[-1]) < 1e-4:  # Fourier: a zero eigenvalue, on the first two coordinates
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 2**-0.5, 2**-0.5 * 1j
    Bc = V.conj().T @ B[:, 0]
    if B_clip is not None:
        Bc = Bc.real + 1j * np.clip(Bc.imag, -B_clip, B_clip)
    return W, P @ V.conj(), Bc, V


def diagonal(init: str, N: int, *, real_scale: float = 1.0, imag_scale: float = 1.0) -> Array:
    """Diagonal A (N/2,) complex of an S4D initialisation: lin, inv, inv2, quad, real, legs (also: rand)."""
    init = _SAME.get(init, init)
    _even(N, f"diag-{init}")
    n = np.arange(N // 2, dtype=np.float64)
    real = np.full(N // 2, 0.5)
    if init == "lin":
        imag = np.pi * n
    elif init == "inv":
        imag = N / np.pi * (N / (1 + 2 * n) - 1)
    elif init == "inv2":
        imag = N / np.pi * (N / (1 + n) - 1)
    elif init == "quad":
        imag = (1 + 2 * n) ** 2 / np.pi
    elif init == "real":
        imag, real = 0 * n, 1 + n
    elif init == "legs":
        imag = -nplr("legs", N)[0].imag
    elif init == "rand":
        imag = np.exp(_rng().standard_normal(N // 2))
    else:
        raise ValueError(f"diagonal initialisation {init!r} is not known; expected one of {', '.join(DIAGONAL)}")
    return -real_scale * real - 1j * imag_scale * imag


def _rng() -> np.random.Generator:
    """Random numbers that follow torch's global seed."""
    import torch

    return np.random.default_rng(int(torch.randint(0, 2**62, (), device="cpu")))


def ssm(
    init: str, N: int, rank: int, *, B_init: str = "constant", B_scale: float = 1.0, P_scale: float = 1.0,
    real_scale: float = 1.0, imag_scale: float = 1.0, B_clip: float | None = 2.0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """A (N/2,), P (rank, N/2), B (N/2,) of a measure, "diag-xxx" (P = 0) or "dplr-xxx" (random P)."""
    kind, _, rest = init.partition("-")
    if kind not in ("diag", "dplr"):
        W, P, B, _ = nplr(init, N, rank, B_clip)
        return W, P, B
    rest = _SAME.get(rest or "hippo", rest or "hippo")
    A = diagonal(rest, N, real_scale=real_scale, imag_scale=imag_scale)
    half = N // 2

    def normal(*shape: int) -> Array:
        return (_rng().standard_normal(shape) + 1j * _rng().standard_normal(shape)) * 2**-0.5

    if rest == "legs":
        B = nplr("legs", N)[2]
    elif B_init == "constant":
        B = np.ones(half, complex)
    elif B_init == "random":
        B = normal(half)
    elif B_init == "alternating":
        B = (-1.0 + 0j) ** np.arange(half)
    elif B_init in ("unit-cw", "unit-ccw"):
        B = np.exp((-2j if B_init == "unit-cw" else 2j) * np.pi / N) ** np.arange(half)
    else:
        raise ValueError(f"B_init is {B_init!r}; expected constant, random, alternating, unit-cw or unit-ccw")
    P = normal(rank, half) * (0.0 if kind == "diag" else P_scale)
    return A, P, B * B_scale


def combination(
    init: str | list[str], N: int, rank: int, copies: int, **arguments: object
) -> tuple[Array, Array, Array]:
    """``copies`` initialisations: A (copies, N/2), P (rank, copies, N/2), B (copies, N/2).

    A list of names, or "hippo" (legs, fout), "diag" (diag-inv, diag-lin), "all", gives each an equal consecutive part.
    """
    names = COMBINATIONS.get(init, (init,)) if isinstance(init, str) else tuple(init)
    if copies % len(names):
        raise ValueError(
            f"{copies} independent SSMs (n_ssm) do not divide among the {len(names)} initialisations {names}"
        )
    share = copies // len(names)
    made = [ssm(name, N, rank, **arguments) for name in names for _ in range(1)]  # type: ignore[arg-type]
    A = np.concatenate([np.repeat(a[None], share, 0) for a, _, _ in made])
    P = np.concatenate([np.repeat(p[:, None], share, 1) for _, p, _ in made], axis=1)
    B = np.concatenate([np.repeat(b[None], share, 0) for _, _, b in made])
    return A, P, B


def legs_normal_blocks(size: int, blocks: int) -> tuple[Array, Array]:
    """S5: eigenvalues (size/2,) of ``blocks`` LegS normal parts, and eigenvectors V (size, size/2) by block."""
    if size % blocks or (size // blocks) % 2:
        raise ValueError(f"ssm_size {size} does not divide into {blocks} blocks of even size")
    W, _, _, V = nplr("legs", size // blocks)
    wide = np.zeros((size, size // 2), complex)
    step = size // blocks
    for i in range(blocks):
        wide[i * step : (i + 1) * step, i * step // 2 : (i + 1) * step // 2] = V
    return np.tile(W, blocks), wide
