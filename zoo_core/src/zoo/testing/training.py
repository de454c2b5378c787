"""The part of the contract that concerns training's memory and precision: gradient checkpointing and autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Case, case
from .compare import assert_close, relative_error
from .contract import CLOSE, _floats, _project, _run


def check_grad_checkpointing(what: str | Case) -> bool:
    """Models with ``set_grad_checkpointing``: a training step with it gives the same outputs, gradients and buffers
    (so dropout draws the same masks again, and running statistics count a batch once), and with two blocks or more
    saves fewer bytes for the backward pass."""
    c = case(what)
    if not hasattr(c.build(), "set_grad_checkpointing"):
        return False
    plain, saved, _ = _training_step(c, recompute=False)
    again, fewer, blocks = _training_step(c, recompute=True)
    for name, tensor in plain.items():
        assert_close(again[name], tensor, tolerance=CLOSE, what=f"{c.name}: {name} with gradient checkpointing")
    assert fewer < saved or blocks < 2, (
        f"{c.name}: with gradient checkpointing {fewer:,} bytes are saved for the backward pass, without {saved:,}, "
        f"though {blocks} blocks are to be recomputed"
    )
    return True


def _training_step(c: Case, *, recompute: bool) -> tuple[dict[str, Tensor], int, int]:
    """Outputs, gradients and buffers of a fresh model's training step; the bytes saved for its backward pass, inputs
    of recomputed blocks included; and the number of these blocks."""
    model = c.build().train()
    model.set_grad_checkpointing(recompute)  # type: ignore[operator]
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = _floats(_run(model, c.inputs()))
    _project(outputs, c.name).backward()
    found = {f"output {k}": v for k, v in outputs.items()}
    found |= {f"the gradient of {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    found |= {f"the buffer {k}": b for k, b in model.named_buffers()}
    return found, sum(sizes.values()), sum(getattr(m, "grad_checkpointing", False) for m in model.modules())


def check_autocast(what: str | Case) -> bool:
    """Under ``torch.autocast("cpu", torch.bfloat16)`` the outputs are finite and near those in float32, which do not
    change afterwards; and a training step gives finite gradients in the parameters' own dtype."""
    c = case(what)
    model, inputs = c.build().eval(), c.inputs()
    with torch.no_grad():
        exact = _floats(_run(c.build().eval(), inputs))
        with torch.autocast("cpu", torch.bfloat16):
            rough = _floats(_run(model, inputs))
        after = _run(model, inputs)  # of what the pass before may have kept
    for name, tensor in exact.items():
        found = rough[name].to(tensor.dtype)
        assert torch.isfinite(found).all(), f"{c.name}: {name} is not finite under autocast"
        if found.shape == tensor.shape:  # where it does not depend on values
            error = relative_error(found, tensor)
            assert error < 0.25, f"{c.name}: {name} under autocast is {error:.2g} away from float32"
        assert_close(after[name], tensor, tolerance=1e-6, what=f"{c.name}: {name} in float32 after autocast")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = _floats(_run(model, inputs))
    _project(outputs, c.name).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), f"{c.name}: under autocast {name} gets a gradient not finite"
            assert parameter.grad.dtype == parameter.dtype, (
                f"{c.name}: under autocast {name} is {parameter.dtype}, its gradient {parameter.grad.dtype}"
            )
    return True
