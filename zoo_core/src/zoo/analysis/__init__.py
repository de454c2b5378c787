"""Every sequence mixer in one recurrent form, and what can be read off it: the Dynamical Systems Framework (DSF).

::

    from zoo.analysis import core, decay, modulus_shares

    c = core(mixer, x)                # a Mamba, Mamba-2, S4D or LRU layer, attention, qLSTM ... on one sequence
    c.form.mixing()                   # (length, length, d_out, d_in): what each input gives to each output
    modulus_shares(decay(mixer, x), [0.5, 0.9, 0.99])

Paper: Sieber et al., "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent
Neural Networks", arXiv 2405.15731; eigenvalues: "Task-Level Insights from Eigenvalues across Sequence Models", arXiv
2510.09379.
"""

from . import formulas
from .attention import CausalAttention, GatedAttention, NormalisedAttention, NormAttention
from .form import Form
from .mixers import Core, core, decay
from .qlstm import QLSTM
from .spectra import distance, horizon, modulus_shares, phase, slice_ranks

__all__ = [
    "QLSTM",
    "CausalAttention",
    "Core",
    "Form",
    "GatedAttention",
    "NormAttention",
    "NormalisedAttention",
    "core",
    "decay",
    "distance",
    "formulas",
    "horizon",
    "modulus_shares",
    "phase",
    "slice_ranks",
]
