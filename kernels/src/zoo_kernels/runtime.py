"""What layers built on these operators may ask and share: which back end is forced, and memory for large results.

- :func:`forced_backend`: its name, or ``""``. A layer's fast paths step aside for all but ``""`` and ``"native"``.
- :func:`instruction_set`: which of the processor's the native library uses, or ``""`` where there is no library.
- :func:`passed_over`: say once, on the logger ``zoo_kernels``, why something does not run on a back end.
- :func:`on_threads`: Python functions on the threads of torch's own operators.
- :func:`empty`, :func:`reusing`: large CPU tensors in huge pages, and blocks in which freed ones are taken again.
"""

from ._backends import forced as forced_backend
from ._backends import passed_over
from ._memory import empty, reusing
from ._native import instruction_set
from ._threads import on_threads

__all__ = ["empty", "forced_backend", "instruction_set", "on_threads", "passed_over", "reusing"]
