"""Parity with an original on recorded tensors: files with ``state/``, ``in/``, ``out/``, ``mid/`` and ``grad/``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .compare import assert_close

#: Gradients pass through more float32 operations than outputs; an order of magnitude is left for them.
GRAD_TOLERANCE = 1e-3


def check_golden(
    path: str | Path,
    *,
    grad: bool = False,
    tolerance: float = 1e-4,
    grad_tolerance: float = GRAD_TOLERANCE,
    skip_mid: tuple[str, ...] = (),
    device: str = "cpu",
) -> dict[str, float]:
    """Recompute every ``out/`` and ``mid/`` tensor of a golden file with the zoo's code and compare.

    Floats within ``tolerance`` of the largest value, integers exactly. ``grad``: also the ``grad/`` tensors.
    ``skip_mid``: intermediates that our formulation does not have (say why beside the call). ``device``: where the
    model runs. Returns the error of each tensor. An adapter that is not installed is a failure, not a skip.
    """
    from zoo.reference import adapter, read_golden

    golden = read_golden(path)
    found = adapter(golden.system).replay(path, grad=grad, device=device)
    expected: dict[str, Tensor] = {f"out/{k}": v for k, v in golden.outputs.items()}
    expected |= {f"mid/{k}": v for k, v in golden.mids.items() if k not in skip_mid}
    if grad:
        expected |= {f"grad/{k}": v for k, v in golden.grads.items()}
    assert expected, f"{path} holds nothing to compare"
    missing = [k for k in expected if k not in found]
    assert not missing, (
        f"{Path(path).name}: {len(missing)} of {len(expected)} tensors were not recomputed: {missing[:5]}"
    )
    errors: dict[str, float] = {}
    failures: list[str] = []
    for name, tensor in expected.items():
        allowed = grad_tolerance if name.startswith("grad/") else tolerance
        try:
            errors[name] = assert_close(found[name], tensor, tolerance=allowed, what=name)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, f"{Path(path).name}: {len(failures)} of {len(expected)} differ: " + "; ".join(failures[:5])
    return errors
