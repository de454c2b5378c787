"""The form of each mixer of the paper from its parts, on one sequence.

Queries and keys are (length, n), values come as W_V (d_out, d_in), gates and steps are (length, d). Where a mixer keeps
n states a channel, N = d n. Source: arXiv 2405.15731, table 1; the rows of mLSTM, S4D's discretisation and the exponent
of the reversed sigmoid are those of the cited models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form


def _kron(matrix: Tensor, feature: Tensor) -> Tensor:
    """kron(matrix (d, d_in), feature_i) for each i: (length, d * n, d_in)."""
    return torch.einsum("ce,in->icne", matrix, feature).flatten(1, 2)


def _spread(feature: Tensor, channels: int) -> Tensor:
    """kron(I, feature_i^T): (length, channels, channels * n)."""
    eye = torch.eye(channels, dtype=feature.dtype, device=feature.device)
    return torch.einsum("ce,in->icen", eye, feature).flatten(2)


def _block(values: Tensor) -> Tensor:
    """values (length, d, n) as the columns (length, d * n, d) that feed channel c's states from input c."""
    eye = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    return torch.einsum("icn,ce->icne", values, eye).flatten(1, 2)


def taylor_features(x: Tensor) -> Tensor:
    """1, x, x (x) x / sqrt(2) of x / n^(1/4): exp(q.k / sqrt(n)) to second order as an inner product."""
    x = x / x.shape[-1] ** 0.25
    return torch.cat([torch.ones_like(x[:, :1]), x, (x[:, :, None] * x[:, None]).flatten(1) / 2**0.5], dim=1)


def eta_ratio(eta: Tensor) -> Tensor:
    """eta_(i-1) / eta_i, (..., length - 1): the eigenvalue of attention's A_i; it may exceed 1."""
    return eta[..., :-1] / eta[..., 1:]


def softmax_eta(scores: Tensor) -> Tensor:
    """log eta_i, the log of the sum over j <= i of exp(scores[i, j]); scores (..., length, length)."""
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~past, -torch.inf).logsumexp(-1)


def separable_attention(phi: Tensor, psi: Tensor, W_V: Tensor, eta: Tensor) -> Form:
    """Attention with features phi of queries and psi of keys, (length, n), over the normaliser eta (length,)."""
    A = torch.cat([torch.zeros_like(eta[:1]), eta_ratio(eta)])
    n, channels = psi.shape[1], W_V.shape[0]
    return Form(A[:, None].expand(-1, n * channels), _kron(W_V, psi / eta[:, None]), _spread(phi, channels))


def causal_eta(phi: Tensor, psi: Tensor) -> Tensor:
    """eta_i, the sum over j <= i of phi_i . psi_j."""
    return (phi * psi.cumsum(0)).sum(-1)


def linear_attention(q: Tensor, k: Tensor, W_V: Tensor) -> Form:
    """phi = psi = elu + 1 (Katharopoulos et al., arXiv 2006.16236)."""
    phi, psi = F.elu(q) + 1, F.elu(k) + 1
    return separable_attention(phi, psi, W_V, causal_eta(phi, psi))


def taylor_attention(q: Tensor, k: Tensor, W_V: Tensor) -> Form:
    """Softmax attention's features up to second order."""
    phi, psi = taylor_features(q), taylor_features(k)
    return separable_attention(phi, psi, W_V, causal_eta(phi, psi))


def normalised_attention(q: Tensor, k: Tensor, W_V: Tensor, eta: Tensor) -> Form:
    """The paper's proposal: no features, and a normaliser eta_i = exp(w u_i + b) learnt instead of summed."""
    return separable_attention(q, k, W_V, eta)


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """(length, length): softmax attention has no exact finite form, its Phi[i, j] is this times W_V."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    return torch.exp(scores - softmax_eta(scores)[:, None]).tril()


def s4d(eigenvalues: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int) -> Form:
    """A diagonal time-invariant system by zero-order hold: eigenvalues, B, C (d, n), dt, D (d).

    The output is Re(C h); implementations with conjugate pairs take twice that.
    """
    A = torch.exp(eigenvalues * dt[:, None])
    fed = (A - 1) / eigenvalues * B
    return Form(
        A.flatten().repeat(length, 1), _block(fed.expand(length, -1, -1)),
        _block(C.expand(length, -1, -1)).transpose(1, 2), torch.diag(D).expand(length, -1, -1),
    )  # fmt: skip


def s6(delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, D: Tensor) -> Form:
    """Mamba's scan: steps delta (length, d), rate (d, n) positive, b and c (length, n), D (d)."""
    channels = delta.shape[1]
    A = torch.exp(-delta[:, :, None] * rate)
    fed = delta[:, :, None] * b[:, None]
    return Form(A.flatten(1), _block(fed), _spread(c, channels), torch.diag(D).expand(len(delta), -1, -1))


def ssd(delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, D: Tensor, channels: int) -> Form:
    """Mamba-2's scan, one head: steps delta (length,), rate and D numbers, b and c (length, n)."""
    n, length = b.shape[1], len(delta)
    A = torch.exp(-rate * delta)[:, None].expand(-1, n * channels)
    eye = torch.eye(channels, dtype=b.dtype, device=b.device)
    return Form(A, _kron(eye, delta[:, None] * b), _spread(c, channels), (D * eye).expand(length, -1, -1))


def ssd_eta(delta: Tensor, rate: Tensor) -> Tensor:
    """The normaliser of attention that SSD's decay amounts to: exp(rate times the summed steps)."""
    return torch.exp(rate * delta.cumsum(0))


def reversed_sigmoid(gate: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
    """sigmoid(-gate)^alpha = exp(-alpha softplus(gate)): the decay of S6 and SSD as a gate."""
    return torch.exp(-alpha * F.softplus(gate))


def qlstm(decay: Tensor, write: Tensor, read: Tensor, W_u: Tensor) -> Form:
    """An LSTM with gates of the inputs alone and a linear cell: decay, write, read (length, d), between 0 and 1."""
    return Form(decay, write[:, :, None] * W_u, torch.diag_embed(read))


def rglru(recurrence: Tensor, gate: Tensor, decay: Tensor) -> Form:
    """RG-LRU (arXiv 2402.19427): a_i = decay^(8 r_i), input sqrt(1 - a_i^2) gate_i; r, gate (length, d), decay (d)."""
    A = torch.exp(8 * recurrence * torch.log(decay))
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device).expand(len(A), -1, -1)
    return Form(A, torch.diag_embed(torch.sqrt(1 - A.square()) * gate), eye)


def mlstm(q: Tensor, k: Tensor, W_V: Tensor, forget: Tensor, write: Tensor, read: Tensor) -> tuple[Form, Tensor]:
    """xLSTM's matrix memory: forget and write (length,), read (length, d). Also the normaliser max(|n_i . q_i|, 1)."""
    n, channels = q.shape[1], W_V.shape[0]
    keys = k / n**0.5
    total = torch.zeros_like(keys[0])
    eta = []
    for i in range(len(q)):
        total = forget[i] * total + write[i] * keys[i]
        eta.append((total @ q[i]).abs().clamp(min=1.0))
    normaliser = torch.stack(eta)
    C = read[:, :, None] * _spread(q / normaliser[:, None], channels)
    return Form(forget[:, None].expand(-1, n * channels), _kron(W_V, write[:, None] * keys), C), normaliser


def lstm(u: Tensor, W: dict[str, Tensor], U: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """An LSTM, which is not linear in its state: y (length, d), and the forget gates, the cell path's A_i.

    W, U, b: matrices and biases of the gates "f", "i", "o" and of the input "u" (without bias).
    """
    h = c = torch.zeros_like(b["f"])
    outputs, forget = [], []
    for x in u:
        f, i, o = (torch.sigmoid(W[g] @ x + U[g] @ h + b[g]) for g in ("f", "i", "o"))
        c = f * c + i * torch.tanh(W["u"] @ x + U["u"] @ h)
        h = o * torch.tanh(c)
        outputs.append(h)
        forget.append(f)
    return torch.stack(outputs), torch.stack(forget)
