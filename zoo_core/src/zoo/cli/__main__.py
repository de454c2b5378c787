"""``python -m zoo.cli``, for environments whose scripts are not on the PATH."""

from . import main

main()
