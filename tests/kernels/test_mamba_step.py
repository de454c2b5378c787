"""The fused step of a stack of blocks: native against the plain definition, every weight format and instruction set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import util

import zoo_kernels as zk
from zoo_kernels import MambaBlock, MambaStep, Matrix


@pytest.fixture
def native(native):
    """A library built before this step existed has none."""
    reason = native.missing("mamba_step")
    if reason is not None:
        pytest.skip(reason)
    return native


FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def matrix(out: int, features: int, kind: torch.dtype, bias: bool = False) -> Matrix:
    return Matrix.pack(torch.randn(out, features) / features**0.5, kind, torch.randn(out) if bias else None)


def mamba(dim: int, inner: int, states: int, rank: int, width: int, kind: torch.dtype, bias: bool) -> MambaBlock:
    return MambaBlock(
        norm=torch.rand(dim) + 0.5, norm_eps=1e-5, in_proj=matrix(2 * inner, dim, kind, bias),
        out_proj=matrix(dim, inner, kind, bias), conv=torch.randn(width, inner),
        conv_bias=torch.randn(inner) if bias else None, A=-torch.rand(inner, states) * 4, skip=torch.randn(inner),
        states=states, x_proj=matrix(rank + 2 * states, inner, kind), dt_proj=matrix(inner, rank, kind, True),
    )  # fmt: skip


def mamba2(dim: int, heads: int, headdim: int, states: int, groups: int, kind: torch.dtype, **options) -> MambaBlock:
    inner, channels = heads * headdim, heads * headdim + 2 * groups * states
    return MambaBlock(
        norm=torch.rand(dim) + 0.5, norm_eps=1e-5, in_proj=matrix(inner + channels + heads, dim, kind),
        out_proj=matrix(dim, inner, kind), conv=torch.randn(4, channels), conv_bias=torch.randn(channels),
        A=-torch.rand(heads) * 4, skip=torch.randn(inner), states=states, heads=heads, groups=groups,
        dt_bias=torch.randn(heads), gate_norm=torch.rand(inner) + 0.5, **options,
    )  # fmt: skip


def stack(kind: torch.dtype) -> MambaStep:
    """Blocks of both kinds and awkward sizes."""
    dim = 37
    blocks = [
        mamba(dim, 74, 16, 3, 4, kind, False),
        mamba(dim, 51, 17, 5, 3, kind, True),
        mamba2(dim, 4, 18, 33, 2, kind, dt_limit=(0.01, 0.5)),
        mamba2(dim, 2, 32, 64, 1, kind, norm_before_gate=True),
    ]
    return MambaStep(blocks, torch.randn(61, dim), torch.rand(dim) + 0.5, 1e-5, matrix(61, dim, kind))


def rest(step: MambaStep, window: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for block in step.blocks:
        shape = (block.heads, block.inner // block.heads) if block.heads else (block.inner,)
        found.append((torch.zeros(block.conv.shape, dtype=window), torch.zeros(*shape, block.states)))
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_threads_step_with_one_stack(native, kind: torch.dtype) -> None:
    """Steps run without Python's lock. They shared the room to work in: wrong logits, or the end of the process."""
    torch.manual_seed(0)
    blocks = [mamba(160, 320, 16, 10, 4, kind, True), mamba2(160, 10, 32, 32, 1, kind)]
    step = MambaStep(blocks, torch.randn(61, 160), torch.rand(160) + 0.5, 1e-5, matrix(61, 160, kind))

    def read(first: int) -> torch.Tensor:
        states = rest(step)
        for i in range(60):
            logits = step((first + i) % 61, states)
        return logits

    want = [read(first) for first in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in (list(pool.map(read, range(4))) for _ in range(3)):
            assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("kind", FORMATS)
def test_native_equals_the_definition(native, kind: torch.dtype) -> None:
    step = stack(kind)
    own, plain = rest(step), rest(step)
    for token in (3, 60, 0, 3, 17, 22):
        found = step(token, own)
        with zk.backend("reference"):
            assert step.backend == "reference"
            want = step(token, plain)
        assert step.backend == "native"
        util.close(found, want)
    for (window, state), (plain_window, plain_state) in zip(own, plain, strict=True):
        util.close(window, plain_window)
        util.close(state, plain_state)


def test_windows_of_half_precision(native) -> None:
    step = stack(torch.float32)
    for kind in (torch.bfloat16, torch.float16):
        own, plain = rest(step, kind), rest(step, kind)
        for token in (3, 60, 0, 3, 17, 22):
            found = step(token, own)
            with zk.backend("reference"):
                # A window that rounds the other way is worth half a unit of its last place.
                util.close(found, step(token, plain), dtype=kind)


def test_threads_give_equal_bits(native) -> None:
    blocks = [mamba(160, 320, 16, 10, 4, torch.float32, True), mamba2(160, 5, 64, 64, 1, torch.float32)]
    step = MambaStep(blocks, torch.randn(900, 160), torch.rand(160), 1e-5, matrix(900, 160, torch.float32))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            states = rest(step)
            found.append([step(token, states) for token in (5, 6, 899)][-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(native, isa: str) -> None:
    if isa not in native.known():
        pytest.skip(f"this processor has no {isa}")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, zoo_kernels as zk, test_mamba_step as t\n"
        "torch.manual_seed(0); step = t.stack(torch.int8); own, plain = t.rest(step), t.rest(step)\n"
        "for token in (3, 60, 0):\n"
        "    found = step(token, own)\n"
        "    with zk.backend('reference'): want = step(token, plain)\n"
        "assert (found - want).abs().max() < 2e-5 * want.abs().max(), (found - want).abs().max()\n"
    )
    util.run_python(code, ZOO_KERNELS_ISA=isa)


def test_int8_keeps_rows_within_half_a_step() -> None:
    weight = torch.randn(5, 40) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1.0])[:, None]
    packed = Matrix.pack(weight, torch.int8)
    assert packed.scale is not None
    assert ((packed.dense() - weight).abs() <= packed.scale[:, None] * 0.5001).all()
    assert Matrix.pack(weight, torch.float32).weight.data_ptr() == weight.data_ptr()


def test_errors() -> None:
    step = stack(torch.float32)
    with pytest.raises(ValueError, match="token is 61; it must be from 0 to 60"):
        step(61, rest(step))
    with pytest.raises(ValueError, match="3 states were given for 4 blocks"):
        step(0, rest(step)[:3])
    states = rest(step)
    states[1] = (states[1][0], states[1][1].double())
    with pytest.raises(ValueError, match=r"states\[1\] is torch.float64"):
        step(0, states)
    states = rest(step)
    states[2] = (states[2][0][1:], states[2][1])
    with pytest.raises(ValueError, match="the window of block 2"):
        step(0, states)
    with pytest.raises(ValueError, match=r"weights are torch.float64"):
        Matrix.pack(torch.randn(2, 2), torch.float64)
