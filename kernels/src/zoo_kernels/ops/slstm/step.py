"""One decoding step of the sLSTM with a carried state."""

from __future__ import annotations

import torch
from torch import Tensor


def slstm_step(gates: Tensor, recurrent: Tensor, bias: Tensor | None = None, *, state: Tensor) -> Tensor:
    """One step of :func:`zoo_kernels.slstm`; ``state`` (4, batch, heads, headdim) is updated in place.

    gates: (batch, 4, heads, headdim); recurrent, bias as there. Returns y: (batch, heads, headdim), gates' dtype.
    Raises ValueError as :func:`zoo_kernels.slstm`.
    """
    from . import slstm

    with torch.no_grad():
        y, final = slstm(gates[:, None], recurrent, bias, initial_state=state, return_final_state=True)
        assert final is not None
        state.copy_(final)
    return y[:, 0]
