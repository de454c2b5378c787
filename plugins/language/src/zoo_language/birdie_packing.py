"""Birdie's packing: several samples a row, and what tells the model which token belongs to which.

Original: samblouir/birdie @ b81f78e (``birdie_rl/pipeline/packer_batcher2.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Packer:
    """Several samples a row, rows filled best-fit: what the trainer reads.

    A row holds ``input, start, label[:-1]`` of each sample; labels stand from the start token on, -100 elsewhere;
    ``segment_ids`` count samples from 1; ``attention_mask`` is 1 on inputs (read in both directions), 3 on what is
    generated, 0 on padding. Original: ``pipeline/packer_batcher2.py``.
    """

    def __init__(
        self,
        batch_size: int,
        sequence_length: int,
        minimum_sequence_length: int,
        start_generating_id: int = 2,
        max_samples_per_packer: int | None = None,
    ) -> None:
        self.length, self.minimum, self.start = sequence_length, minimum_sequence_length, start_generating_id
        self.most = max_samples_per_packer
        shape = (batch_size, sequence_length)
        self.rows = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "attention_mask")}
        self.rows["label_ids"] = np.full(shape, -100, np.int32)
        self.used, self.samples = [0] * batch_size, [0] * batch_size

    def _row(self, needed: int) -> int | None:
        """The row with the least space left that still fits; the first on ties."""
        fits = [
            (self.length - used, row)
            for row, used in enumerate(self.used)
            if needed <= self.length - used and (self.most is None or self.samples[row] < self.most)
        ]
        return min(fits)[1] if fits else None

    def can_accept(self, input_ids: Sequence[int], label_ids: Sequence[int]) -> bool:
        if not len(input_ids) or not len(label_ids):
            return False
        return self._row(len(input_ids) + len(label_ids)) is not None

    def add(self, input_ids: Sequence[int], label_ids: Sequence[int]) -> bool:
        """Place a sample; returns whether the batch is ready. Raises ValueError for one that does not fit."""
        if not self.can_accept(input_ids, label_ids):
            raise ValueError(f"a sample of {len(input_ids)} + {len(label_ids)} tokens fits in no row")
        row = self._row(len(input_ids) + len(label_ids))
        assert row is not None
        start, middle = self.used[row], self.used[row] + len(input_ids)
        end = middle + len(label_ids)
        self.samples[row] += 1
        self.rows["input_ids"][row, start:end] = [*input_ids, self.start, *label_ids[:-1]]
        self.rows["label_ids"][row, middle:end] = label_ids
        self.rows["segment_ids"][row, start:end] = self.samples[row]
        self.rows["attention_mask"][row, start:middle] = 1
        self.rows["attention_mask"][row, middle:end] = 3
        self.used[row] = end
        return self.ready

    @property
    def ready(self) -> bool:
        return all(self.length - used <= self.minimum for used in self.used)

    def pop(self) -> dict[str, np.ndarray]:
        """The batch, (rows, length) int32 each; the packer starts anew."""
        rows = self.rows
        self.__init__(len(self.used), self.length, self.minimum, self.start, self.most)  # type: ignore[misc]
        return rows
