"""Run the native library over odd shapes and every operator's small cases, for .ci/sanitize; not a test module."""

from __future__ import annotations

import argparse
import sys

import torch

import zoo_kernels as zk
from zoo_kernels import _native


def scans(lengths: tuple[int, ...], widths: tuple[int, ...]) -> None:
    """selective_scan and causal_conv1d at the edges: no step, one step, partial chunks and vectors, short paths."""
    for length in lengths:
        for channels in widths:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):

                def r(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
                    return torch.randn(*shape).to(kind).requires_grad_()

                path = torch.randperm(length)[: max(length // 2, 1)] if length else None
                lengths_ = torch.tensor([0, 0 if path is None else path.numel()])
                for state in (1, 5, 16):
                    wide = torch.promote_types(dtype, torch.float32)
                    y, final = zk.selective_scan(
                        r(2, length, channels), r(2, length, channels), r(channels, state), r(2, length, state),
                        r(2, length, state), r(channels), r(2, length, channels), r(channels), dt_softplus=True,
                        path=path, reverse=True, initial_state=r(2, channels, state, kind=wide),
                        return_final_state=True, resets=torch.rand(2, length) < 0.2, lengths=lengths_,
                    )  # fmt: skip
                    assert final is not None
                    (y.sum() + final.sum()).backward()
                y, _ = zk.causal_conv1d(
                    r(2, length, channels), r(channels, 4), r(channels), activation="silu", path=path
                )
                y.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--few", action="store_true", help="fewer cases, for an emulated processor")
    few = parser.parse_args().few
    reason = _native.unavailable()
    if reason is not None:
        sys.exit(reason)
    zk.backend("native")
    torch.set_num_threads(1 if few else 2)
    scans((0, 1, 65) if few else (0, 1, 2, 63, 64, 65, 130), (1, 17) if few else (1, 7, 16, 17, 33, 130))
    zk.backend("auto")
    kinds = (torch.float32,) if few else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    bad = [r for kind in kinds for r in zk.self_check(dtype=kind) if r["backend"] == "native" and r["ok"] is False]
    # Half precision is judged by the tests, with tolerances of their own; here memory is what matters.
    bad = [r for r in bad if r["error"] is None]
    if bad:
        sys.exit(str(bad))
    sys.stdout.write(f"native sweep on {_native.isa()}: done\n")


if __name__ == "__main__":
    main()
