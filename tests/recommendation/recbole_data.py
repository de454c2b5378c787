"""The interactions and scores that RecBole was given when its answers in recbole_1_2_1.json were recorded.

Both come from numpy's legacy generator, whose stream is fixed for good, so that the file holds answers only.
"""

import numpy as np


def interactions() -> tuple[list[str], list[str], np.ndarray]:
    """(users, items, timestamps): 3000 rows, uneven popularity, many ties within float32's 64 seconds."""
    random = np.random.RandomState(20260)
    users = random.zipf(1.3, 3000) % 400
    items = random.zipf(1.2, 3000) % 300
    times = 1_600_000_000 + random.randint(0, 60_000, 3000)
    return [f"u{u}" for u in users], [f"i{i}" for i in items], times.astype(np.float64)


def scores(n_users: int, n_items: int) -> np.ndarray:
    """One row of float32 scores a user id, without ties."""
    return np.random.RandomState(7).permutation(n_users * n_items).reshape(n_users, n_items).astype(np.float32)
