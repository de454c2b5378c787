"""causal_conv1d: every back end against the float64 reference, and its laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import util
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import zoo_kernels as zk

BACKENDS = ["native", "export"]


def exact(x, weight, bias=None, **options):
    with zk.backend("reference"):
        return zk.causal_conv1d(
            *(util.double(t) for t in (x, weight, bias)), **{k: util.double(v) for k, v in options.items()}
        )


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_it_is_a_padded_depthwise_convolution(backend: str, width: int) -> None:
    x, w, b = torch.randn(2, 31, 9).double(), torch.randn(9, width).double(), torch.randn(9).double()
    want = F.silu(F.conv1d(x.transpose(1, 2), w[:, None], b, padding=width - 1, groups=9)[..., :31]).transpose(1, 2)
    with zk.backend(backend):
        y, final = zk.causal_conv1d(x, w, b, activation="silu")
    util.close(y, want)
    assert final is None


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=60)
@given(data=st.data())
def test_any_shape_matches_the_reference(backend: str, data) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, length = draw(st.sampled_from([1, 3])), draw(st.sampled_from([0, 1, 2, 7, 128, 129, 300]))
    channels, width = draw(st.sampled_from([1, 5, 16, 33, 520])), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    x = util.strided(torch.randn(batch, length, channels).to(dtype), draw(st.integers(0, 3)))
    weight = torch.randn(channels, width).to(dtype)
    bias = torch.randn(channels).to(dtype) if draw(st.booleans()) else None
    options: dict = {
        "activation": draw(st.sampled_from([None, "silu"])),
        "reverse": draw(st.booleans()),
        "return_final_state": draw(st.booleans()),
    }
    steps = length
    if draw(st.booleans()) and length:
        steps = draw(st.sampled_from([length, max(1, length // 2)]))
        many = draw(st.booleans())
        path = torch.stack([torch.randperm(length)[:steps] for _ in range(batch if many else 1)])
        options["path"] = path if many else path[0]
    if draw(st.booleans()):
        options["resets"] = torch.rand(batch, length) < 0.2
    if draw(st.booleans()):
        options["lengths"] = torch.randint(0, steps + 1, (batch,))
    if draw(st.booleans()):
        wide = torch.promote_types(dtype, torch.float32)
        options["initial_state"] = torch.randn(batch, width, channels, dtype=wide)
    y0, f0 = exact(x, weight, bias, **options)
    with zk.backend(backend):
        y, f = zk.causal_conv1d(x, weight, bias, **options)
    util.close(y, y0)
    if f0 is not None:
        util.close(f, f0)
    if backend == "native":
        gy, gf = torch.randn(y0.shape).double(), torch.randn(f0.shape).double() if f0 is not None else None

        def grads(name: str, wide: bool) -> list[torch.Tensor]:
            named = {"x": x, "weight": weight, "bias": bias, "initial_state": options.get("initial_state")}
            leaves = {
                k: (util.double(v) if wide else v).detach().requires_grad_() for k, v in named.items() if v is not None
            }
            with zk.backend(name):
                y, f = zk.causal_conv1d(**{**options, **{"bias": None}, **leaves})
            total = (y.double() * gy).sum() + (0 if f is None else (f.double() * gf).sum())
            return list(torch.autograd.grad(total, list(leaves.values())))

        for a, b in zip(grads("native", False), grads("reference", True), strict=True):
            util.close(a, b, dtype=dtype, factor=4)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_by_step_is_the_whole(backend: str, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(2, 9, 21).to(dtype), torch.randn(21, 4).to(dtype), torch.randn(21).to(dtype)
    y0, f0 = exact(x, w, b, activation="silu", return_final_state=True)
    state = torch.zeros(2, 4, 21, dtype=torch.promote_types(dtype, torch.float32))
    with zk.backend(backend):
        for t in range(9):
            y = zk.causal_conv1d_step(x[:, t], w, b, state=state, activation="silu")
            util.close(y, y0[:, t])
    util.close(state, f0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("cut", [1, 3, 20])
def test_pieces_make_the_whole(backend: str, cut: int) -> None:
    x, w = torch.randn(2, 23, 5).double(), torch.randn(5, 4).double()
    with zk.backend(backend):
        y, f = zk.causal_conv1d(x, w, return_final_state=True)
        y1, s = zk.causal_conv1d(x[:, :cut], w, return_final_state=True)
        y2, s = zk.causal_conv1d(x[:, cut:], w, initial_state=s, return_final_state=True)
    util.close(torch.cat([y1, y2], 1), y)
    util.close(s, f)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_path_and_reverse_are_reorderings(backend: str) -> None:
    x, w = torch.randn(2, 23, 5).double(), torch.randn(5, 4).double()
    path = torch.randperm(23)
    with zk.backend(backend):
        y, _ = zk.causal_conv1d(x, w, path=path, reverse=True)
        z, _ = zk.causal_conv1d(x[:, path.flip(0)], w)
    util.close(y[:, path.flip(0)], z)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("walk", ["both ways", "paths", "parts"])
def test_several_paths_are_single_ones_side_by_side(backend: str, walk: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 29, 70)[..., :35].requires_grad_()  # half of a projection, as mixers give it
    w, b, s = (torch.randn(*n).requires_grad_() for n in ((3, 35, 4), (3, 35), (2, 3, 4, 35)))
    reverse = [False, True, False]
    path = None if walk == "both ways" else torch.stack([torch.randperm(29) for _ in range(3)])
    options: dict = {"activation": "silu", "return_final_state": True}
    if walk == "parts":
        path = torch.stack([path, path.flip(-1)])[..., :23]
        options |= {"lengths": torch.tensor([23, 11]), "resets": torch.rand(2, 29) < 0.2}
    with zk.backend(backend):
        y, f = zk.causal_conv1d(x, w, b, initial_state=s, path=path, reverse=reverse, **options)
        ones = [
            zk.causal_conv1d(
                x, w[k], b[k], initial_state=s[:, k], path=None if path is None else path[..., k, :],
                reverse=reverse[k], **options,
            )
            for k in range(3)
        ]  # fmt: skip
        whole = torch.autograd.grad((y.square().sum() + f.sum()), (x, w, b, s))
        parts = torch.autograd.grad(sum(y1.square().sum() + f1.sum() for y1, f1 in ones), (x, w, b, s))
    assert y.shape == (2, 29, 3, 35)
    assert torch.equal(y, torch.stack([y1 for y1, _ in ones], 2))
    assert torch.equal(f, torch.stack([f1 for _, f1 in ones], 1))
    for got, want in zip(whole, parts, strict=True):
        util.close(got, want)


def test_long_sequence(native) -> None:
    x, w = torch.randn(1, 65_537, 3), torch.randn(3, 4)
    with zk.backend("native"):
        util.close(zk.causal_conv1d(x, w)[0], exact(x, w)[0])


def test_gradcheck_and_opcheck(native) -> None:
    from zoo_kernels.ops.causal_conv1d import _cases, _conv

    x, w, b, s = (torch.randn(*n).double().requires_grad_() for n in ((2, 6, 3), (3, 4), (3,), (2, 4, 3)))
    resets = torch.zeros(2, 6, dtype=torch.bool)
    resets[1, 2] = True
    for name in ("native", "reference"):
        with zk.backend(name):
            assert torch.autograd.gradcheck(
                lambda x, w, b, s: zk.causal_conv1d(
                    x, w, b, activation="silu", initial_state=s, return_final_state=True, resets=resets,
                    path=torch.tensor([3, 1, 0, 5, 4, 2]),
                ),
                (x, w, b, s),
            )  # fmt: skip
        for args in _cases(torch.device("cpu"), torch.float32):
            torch.library.opcheck(_conv.op, (*args, False, name))


def test_compiles_and_keeps_threads_equal(native) -> None:
    x, w = torch.randn(3, 200, 40, requires_grad=True), torch.randn(40, 4, requires_grad=True)

    def run(x, w):
        return zk.causal_conv1d(x, w, activation="silu")[0]

    y = run(x, w)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), y)
    grads = torch.autograd.grad(y.sum(), (x, w))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            z = run(x, w)
            assert torch.equal(y, z)
            for a, b in zip(torch.autograd.grad(z.sum(), (x, w)), grads, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has shape \(3, 4\); it must be \(batch, length, channels\)"),
        ({"weight": torch.zeros(5, 9)}, "weight has width 9; it must be 1 to 8"),
        (
            {"weight": torch.zeros(2, 5, 4), "reverse": [True]},
            "reverse has 1 flags; it must be one bool, or one for each of 2 paths",
        ),
        (
            {"weight": torch.zeros(2, 5, 4), "bias": torch.zeros(5)},
            r"bias has shape \(5,\); it must be \(paths 2, channels 5\)",
        ),
        ({"weight": torch.zeros(4, 4)}, r"weight has shape \(4, 4\); it must be \(channels 5, width\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(channels 5\)"),
        ({"activation": "relu"}, "activation is 'relu'; it must be None or 'silu'"),
        ({"path": torch.tensor([0, 11])}, "path has rows 0 to 11"),
        (
            {"initial_state": torch.zeros(2, 3, 5)},
            r"initial_state has shape \(2, 3, 5\); it must be \(batch 2, width 4, ",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zk.causal_conv1d(**{"x": torch.zeros(2, 11, 5), "weight": torch.zeros(5, 4), **change})
