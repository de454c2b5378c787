"""A catalogue whose best possible recommender is known: people who follow serials.

The catalogue holds ``SERIES`` series of ``EPISODES`` episodes in ``GENRES`` genres. A user keeps a place in every
series. At each step, given the history alone:

* with probability ``CONTINUE`` the next episode of the series watched last (if there is one),
* with probability ``RESUME`` the next episode of the series watched before that one (if there is one),
* otherwise (and with whatever the first two could not use) the first episode of a series not begun yet, of the last
  episode's genre with probability ``SAME_GENRE``, else of any genre.

So the chance of every next item follows from the history exactly (:func:`chances`): ranking by it is the best that any
recommender can do, and its scores on the test samples are what ours are printed beside. Following it needs a memory of
the last series, of the one before it and of the places in both: a recurrence's job.
"""

from __future__ import annotations

import numpy as np

SERIES, EPISODES, GENRES = 48, 8, 6
ITEMS = SERIES * EPISODES
CONTINUE, RESUME, SAME_GENRE = 0.55, 0.25, 0.7


def genre(series: int) -> int:
    return series % GENRES


def names() -> list[str]:
    """Names by item id from 1: "s07e3"."""
    return [f"s{series:02d}e{episode + 1}" for series in range(SERIES) for episode in range(EPISODES)]


def chances(history: list[int]) -> np.ndarray:
    """The chance of each next item, (ITEMS + 1,), index 0 unused; ``history`` are item ids from 1, oldest first."""
    place = np.zeros(SERIES, dtype=int)  # episodes watched
    order: list[int] = []  # series by last use, newest last
    for item in history:
        series, episode = divmod(item - 1, EPISODES)
        place[series] = episode + 1
        if series in order:
            order.remove(series)
        order.append(series)
    chance = np.zeros(ITEMS + 1)
    rest = 1.0
    for back, probability in ((1, CONTINUE), (2, RESUME)):
        if len(order) >= back and place[order[-back]] < EPISODES:
            series = order[-back]
            chance[series * EPISODES + place[series] + 1] += probability
            rest -= probability
    fresh = np.flatnonzero(place == 0)
    if not len(fresh):
        total = chance.sum()
        return chance / total if total else chance
    same = fresh[[genre(s) == genre(order[-1]) for s in fresh]] if order else fresh[:0]
    first_episodes = fresh * EPISODES + 1
    if len(same):
        chance[same * EPISODES + 1] += rest * SAME_GENRE / len(same)
        chance[first_episodes] += rest * (1 - SAME_GENRE) / len(fresh)
    else:
        chance[first_episodes] += rest / len(fresh)
    return chance


def simulate(users: int, seed: int, shortest: int = 12, longest: int = 60) -> tuple[list[str], list[str], list[float]]:
    """(user, item, timestamp) columns; histories of ``shortest`` to ``longest`` items, an hour apart and more."""
    generator = np.random.default_rng(seed)
    label = names()
    columns: tuple[list[str], list[str], list[float]] = ([], [], [])
    for user in range(users):
        history: list[int] = []
        now = float(generator.integers(1_600_000_000, 1_700_000_000))
        for _ in range(int(generator.integers(shortest, longest + 1))):
            chance = chances(history)
            if not chance.sum():
                break
            item = int(generator.choice(ITEMS + 1, p=chance / chance.sum()))
            history.append(item)
            now += float(generator.integers(3_600, 400_000))
            columns[0].append(f"u{user:05d}")
            columns[1].append(label[item - 1])
            columns[2].append(now)
    return columns


def main() -> None:
    """``python serials.py interactions.csv --users 300``: a table to try ``zoo train`` on."""
    import argparse
    import csv

    from zoo.files import whole

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.users < 1:
        parser.error(f"--users is {arguments.users}; expected 1 or more")
    with whole(arguments.out) as work, open(work, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows(zip(*simulate(arguments.users, arguments.seed), strict=True))


if __name__ == "__main__":
    main()
