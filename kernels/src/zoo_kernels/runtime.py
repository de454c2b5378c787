"""What layers built on these operators may ask and share: which back end is forced, and memory for large results.

- :func:`forced_backend`: its name, or ``""``. A layer's fast paths step aside for all but ``""`` and ``"native"``.
- :func:`exporting`: whether operators, a layer's own too, are to be written out as torch's.
- :func:`instruction_set`: which of the processor's the native library uses, or ``""`` where there is no library.
- :data:`OWN_PRODUCTS`: the instruction sets for which native operators' own matrix products are as fast as torch's.
- :func:`passed_over`: say once, on the logger ``zoo_kernels``, why something does not run on a back end.
- :func:`on_threads`: Python functions on the threads of torch's own operators.
- :func:`empty`, :func:`reusing`: large CPU tensors in huge pages, and blocks in which freed ones are taken again.
"""

from ._backends import exporting, passed_over
from ._backends import forced as forced_backend
from ._memory import empty, reusing
from ._native import instruction_set
from ._threads import on_threads

#: On other processors (Apple's above all) torch's products are their maker's, and faster.
OWN_PRODUCTS = ("avx2", "avx512")

__all__ = [
    "OWN_PRODUCTS",
    "empty",
    "exporting",
    "forced_backend",
    "instruction_set",
    "on_threads",
    "passed_over",
    "reusing",
]
