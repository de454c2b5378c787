"""Companion kernels, states and rollouts against the recurrence itself, step by step in double precision."""

import pytest
import torch

from zoo_time_series.companion import companion_kernel, companion_krylov, companion_matrix, krylov, last_state
from zoo_time_series.ssm import ClosedLoopCompanionSSM, CompanionSSM, Differencing, Residual, ShiftSSM, normalised


def drawn(n, d, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(n, d, generator=g, dtype=dtype) for _ in range(3))
    return a / a.abs().sum(-1, keepdim=True), b, c


def walked(u, a, b):
    """States after every step of u (batch, length, channels): (batch, length, channels, d), float64."""
    A, x = companion_matrix(a.double()), torch.zeros(u.shape[0], *b.shape, dtype=torch.float64)
    found = []
    for t in range(u.shape[1]):
        x = torch.einsum("hij,bhj->bhi", A, x) + b.double() * u[:, t, :, None].double()
        found.append(x)
    return torch.stack(found, dim=1)


def close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_matrix_is_shift_plus_last_column():
    expected = torch.tensor([[0.0, 0, 5], [1, 0, 6], [0, 1, 7]])
    assert torch.equal(companion_matrix(torch.tensor([5.0, 6, 7])), expected)


@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 5, 63, 700])
def test_kernels_are_powers(d, length):
    a, b, c = drawn(5, d)
    expected = torch.stack([(c.double() * x).sum(-1) for x in walked_powers(a, b, length)], dim=-1)
    close(companion_kernel(length, a, b, c), expected, 1e-6)
    close(krylov(length, companion_matrix(a), b, c), expected)
    last = torch.stack([x[:, -1] for x in walked_powers(a, b, length)], dim=-1)
    assert (companion_kernel(length, a, b) - last).abs().max() < 1e-6 * b.abs().max()


@pytest.mark.parametrize(("d", "length"), [(7, 5), (7, 63), (64, 200), (3, 2)])
def test_the_originals_form_on_the_unit_circle(d, length):
    """It divides by 0 where an eigenvalue lies on the circle, so here the column is a little below norm 1."""
    a, b, c = drawn(5, d)
    a = 0.9 * a
    expected = krylov(length, companion_matrix(a.double()), b.double(), c.double())
    close(companion_krylov(length, a, b, c), expected, 1e-4)
    tilde = c - (c.unsqueeze(-2) @ torch.linalg.matrix_power(companion_matrix(a), length)).squeeze(-2)
    close(companion_krylov(length, a, b, c_tilde=tilde), expected, 1e-4)


def walked_powers(a, b, length):
    A, x = companion_matrix(a.double()), b.double()
    for _ in range(length):
        yield x
        x = (A @ x.unsqueeze(-1)).squeeze(-1)


def test_a_column_of_norm_one_that_never_decays():
    """a = e_1 turns the state in a circle for ever: nothing decays, and nothing may wrap."""
    a, b, c = torch.eye(6)[:1], torch.randn(1, 6), torch.randn(1, 6)
    found = companion_kernel(4000, a, b, c)
    expected = torch.stack([(c * b.roll(i, -1)).sum(-1) for i in range(6)], -1).repeat(1, 667)[:, :4000]
    close(found, expected, 1e-6)


def test_gradients_are_those_of_the_powers():
    a, b, c = (x.requires_grad_() for x in drawn(3, 5, dtype=torch.float64))
    fast = companion_kernel(17, a, b, c)
    slow = krylov(17, companion_matrix(a), b, c)
    weights = torch.randn(3, 17, dtype=torch.float64)
    for f, s in zip(
        torch.autograd.grad((fast * weights).sum(), [a, b, c]),
        torch.autograd.grad((slow * weights).sum(), [a, b, c]),
        strict=True,
    ):
        close(f, s, 1e-8)


@pytest.mark.parametrize("length", [1, 3, 50])
def test_last_state(length):
    a, b, _ = drawn(4, 6)
    u = torch.randn(3, length, 4)
    close(last_state(u, a, b), walked(u, a, b)[:, -1])
    close(last_state(u, None, b), walked(u, torch.zeros_like(a), b)[:, -1])


@pytest.mark.parametrize("length", [0, -3])
def test_lengths_below_one_are_refused(length):
    a, b, c = drawn(1, 3)
    for call in (lambda: companion_kernel(length, a, b, c), lambda: krylov(length, companion_matrix(a), b, c)):
        with pytest.raises(ValueError, match=f"length is {length}"):
            call()


def test_companion_krylov_takes_c_or_c_tilde():
    a, b, c = drawn(1, 3)
    with pytest.raises(ValueError, match="c or c_tilde"):
        companion_krylov(4, a, b)
    with pytest.raises(ValueError, match="c or c_tilde"):
        companion_krylov(4, a, b, c, c_tilde=c)


def test_normalising():
    x = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
    assert torch.allclose(normalised(x, 1), x / torch.tensor([[7.0], [2.0]]))
    assert torch.allclose(normalised(x, 2)[0], x[0] / 5)
    assert torch.allclose(normalised(x, 0), x / 2)  # the count of entries that are not 0
    small = torch.full((2, 2), 1e-5)
    assert torch.equal(normalised(small, 1), small)  # the mean norm is below the threshold
    # ... which is on the mean over all kernels: one zero row among others is 0 / 0, as in the original.
    assert normalised(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1)[0].isnan().all()


@pytest.mark.parametrize("cls", [CompanionSSM, ShiftSSM])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "heads", [{"n_kernels": 2, "n_heads": 4, "head_dim": 1}, {"n_kernels": 4, "n_heads": 1, "head_dim": 2}]
)
def test_ssm_is_its_recurrence(cls, order, heads):
    torch.manual_seed(1)
    ssm = cls(norm_order=order, model_dim=8, kernel_dim=5, skip_connection=True, **heads).eval()
    if cls is ShiftSSM:
        ssm.a.normal_().mul_(0.3)  # stored, and read
    u = torch.randn(2, 12, 8)
    a = ssm.spread(ssm.column())
    states = walked(u, a, ssm.spread(ssm.b))
    expected = (states * ssm.spread(ssm.c)).sum(-1) + ssm.skip * u
    with torch.no_grad():
        close(ssm(u), expected)
        close(ssm.final_state(u), states[:, -1])
        state = ssm.init_state(2)
        steps = torch.stack([ssm.step(u[:, t], state) for t in range(12)], dim=1)
    close(steps, expected)
    close(state, states[:, -1])


def test_kernel_order_over_heads():
    """(kernel, head, dimension) from slow to fast: the first n_heads * head_dim channels share the first kernel."""
    ssm = CompanionSSM(norm_order=1, model_dim=12, n_kernels=2, kernel_dim=3, head_dim=3)
    assert ssm.n_heads == 2
    assert torch.equal(ssm.spread(torch.tensor([[0.0], [1.0]]))[:, 0], torch.tensor([0.0] * 6 + [1.0] * 6))
    with pytest.raises(ValueError, match="model_dim is 13"):
        CompanionSSM(norm_order=1, model_dim=13, n_kernels=2, kernel_dim=3)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_rollout_is_the_closed_recurrence(order):
    torch.manual_seed(2)
    ssm = ClosedLoopCompanionSSM(norm_order=order, model_dim=3, n_kernels=3, kernel_dim=4, horizon=9).eval()
    for p in (ssm.a, ssm.b, ssm.k):
        p.data.mul_(0.3)
    u = torch.randn(2, 11, 3)

    def norm(x):
        return x / torch.linalg.vector_norm(x, order, dim=-1, keepdim=True) if order > 0 else x

    a, b, c, k = (x.detach().double() for x in (ssm.a, ssm.b, ssm.c, ssm.k))
    x = walked(u, norm(a), b)[:, -1]  # b is not normalised here
    loop = companion_matrix(norm(a)) + norm(b)[..., :, None] * (norm(k) if order > 0 else b)[..., None, :]
    y, own = [], []
    for _ in range(9):
        y.append((x * norm(c)).sum(-1))
        own.append((x * k).sum(-1))
        x = torch.einsum("hij,bhj->bhi", loop, x)
    with torch.no_grad():
        close(ssm(u), torch.stack(y, 1))
        close(ssm.next_inputs(ssm.final_state(u), 9), torch.stack(own, 1))


def test_a_change_of_a_parameter_is_seen():
    ssm = CompanionSSM(norm_order=1, model_dim=4, n_kernels=4, kernel_dim=3).eval()
    u = torch.randn(1, 9, 4)
    with torch.no_grad():
        first = ssm(u)
        ssm.c.mul_(2)
        close(ssm(u), 2 * first)


def test_decoders_need_a_kernel_for_each_channel():
    with pytest.raises(ValueError, match="n_kernels 2"):
        ClosedLoopCompanionSSM(norm_order=1, model_dim=4, n_kernels=2, kernel_dim=3)


# -- preprocessing -----------------------------------------------------------------------------------------------------


def test_differences():
    pre = Differencing(model_dim=8, n_kernels=4, kernel_dim=4, kernel_repeat=2)
    x = torch.randn(1, 20, 8)
    y = pre(x)
    for channel in range(8):
        order = channel % 4
        expected = x[0, :, channel]
        for _ in range(order):
            expected = torch.diff(expected, prepend=torch.zeros(1))
        close(y[0, :, channel], expected)


def test_residuals_from_moving_averages():
    torch.manual_seed(0)
    pre = Residual(model_dim=12, n_kernels=6, kernel_repeat=2, kernel_dim=2, min_avg_window=3, max_avg_window=9)
    x = torch.randn(1, 30, 12)
    y = pre(x)[0].detach()
    windows = (pre.ma_r_kernel != 0).sum(-1)
    for repeat in range(2):
        close(y[:, 6 * repeat], x[0, :, 6 * repeat])  # order 0: itself
        for j in range(2):
            channel, w = 6 * repeat + 4 + j, int(windows[2 * repeat + j])
            padded = torch.cat([torch.zeros(w - 1), x[0, :, channel]])
            close(y[:, channel], x[0, :, channel] - padded.unfold(0, w, 1).mean(-1))
    state = pre.init_state(1)
    steps = torch.stack([pre.step(x[:, t], state) for t in range(30)], 1)
    close(steps[0], y)
