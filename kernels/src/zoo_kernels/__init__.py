"""zoo_kernels: the recurrences of state-space models along any path, on CPU and GPU.

Every operator is a plain function on channel-last tensors ``(batch, length, channels)`` and always returns
``(output, final_state)``, the state being ``None`` unless ``return_final_state=True``. Operators load on first use,
so one that a Triton release breaks does not take the package down.

``backend(name)`` forces an implementation, ``status()`` says which ones can run here and why others cannot, and
``self_check()`` compares them with the reference on this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module that defines it. Importing zoo_kernels imports none of them.
_LAZY = {
    "selective_scan": "zoo_kernels.ops.selective_scan",
    "selective_scan_step": "zoo_kernels.ops.selective_scan",
    "causal_conv1d": "zoo_kernels.ops.causal_conv1d",
    "causal_conv1d_step": "zoo_kernels.ops.causal_conv1d",
    "linear": "zoo_kernels.ops.linear",
    "grouped_mlp": "zoo_kernels.ops.grouped_mlp",
    "path_linear": "zoo_kernels.ops.path_linear",
    "cauchy": "zoo_kernels.ops.cauchy",
    "unit_roots": "zoo_kernels.ops.cauchy",
    "gated_rms_norm": "zoo_kernels.ops.rms_norm",
    "rms_norm": "zoo_kernels.ops.rms_norm",
    "linear_scan": "zoo_kernels.ops.linear_scan",
    "linear_scan_step": "zoo_kernels.ops.linear_scan",
    "kernel_spectrum": "zoo_kernels.ops.long_conv",
    "long_conv": "zoo_kernels.ops.long_conv",
    "long_conv_nd": "zoo_kernels.ops.long_conv",
    "long_conv_step": "zoo_kernels.ops.long_conv",
    "vandermonde_kernel": "zoo_kernels.ops.long_conv",
    "ssd": "zoo_kernels.ops.ssd",
    "ssd_replay": "zoo_kernels.ops.ssd",
    "ssd_step": "zoo_kernels.ops.ssd",
    "ssd_tree": "zoo_kernels.ops.ssd",
    "tree_mask": "zoo_kernels.ops.ssd",
    "ancestor_windows": "zoo_kernels.ops.ssd",
    "causal_conv1d_tree": "zoo_kernels.ops.ssd",
    "linear_attention": "zoo_kernels.ops.linear_attention",
    "linear_attention_step": "zoo_kernels.ops.linear_attention",
    "mlstm": "zoo_kernels.ops.mlstm",
    "mlstm_step": "zoo_kernels.ops.mlstm",
    "slstm": "zoo_kernels.ops.slstm",
    "slstm_step": "zoo_kernels.ops.slstm",
    "mamba3_scan": "zoo_kernels.ops.mamba3_scan",
    "mamba3_step": "zoo_kernels.ops.mamba3_scan",
    # not operators
    "MambaBlock": "zoo_kernels.ops.mamba_step",
    "MambaStep": "zoo_kernels.ops.mamba_step",
    "Matrix": "zoo_kernels.ops.mamba_step",
    "backend": "zoo_kernels._backends",
    "BackendError": "zoo_kernels._backends",
    "status": "zoo_kernels._status",
    "self_check": "zoo_kernels._status",
}

if TYPE_CHECKING:
    from zoo_kernels._backends import BackendError, backend
    from zoo_kernels._status import self_check, status
    from zoo_kernels.ops.cauchy import cauchy, unit_roots
    from zoo_kernels.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
    from zoo_kernels.ops.grouped_mlp import grouped_mlp
    from zoo_kernels.ops.linear import linear
    from zoo_kernels.ops.linear_attention import linear_attention, linear_attention_step
    from zoo_kernels.ops.linear_scan import linear_scan, linear_scan_step
    from zoo_kernels.ops.long_conv import (
        kernel_spectrum,
        long_conv,
        long_conv_nd,
        long_conv_step,
        vandermonde_kernel,
    )
    from zoo_kernels.ops.mamba3_scan import mamba3_scan, mamba3_step
    from zoo_kernels.ops.mamba_step import MambaBlock, MambaStep, Matrix
    from zoo_kernels.ops.mlstm import mlstm, mlstm_step
    from zoo_kernels.ops.path_linear import path_linear
    from zoo_kernels.ops.rms_norm import gated_rms_norm, rms_norm
    from zoo_kernels.ops.selective_scan import selective_scan, selective_scan_step
    from zoo_kernels.ops.slstm import slstm, slstm_step
    from zoo_kernels.ops.ssd import ancestor_windows, causal_conv1d_tree, ssd, ssd_replay, ssd_step, ssd_tree, tree_mask

__all__ = [
    "BackendError",
    "MambaBlock",
    "MambaStep",
    "Matrix",
    "ancestor_windows",
    "backend",
    "cauchy",
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv1d_tree",
    "gated_rms_norm",
    "grouped_mlp",
    "kernel_spectrum",
    "linear",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "long_conv",
    "long_conv_nd",
    "long_conv_step",
    "mamba3_scan",
    "mamba3_step",
    "mlstm",
    "mlstm_step",
    "path_linear",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "self_check",
    "slstm",
    "slstm_step",
    "ssd",
    "ssd_replay",
    "ssd_step",
    "ssd_tree",
    "status",
    "tree_mask",
    "unit_roots",
    "vandermonde_kernel",
]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zoo_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
