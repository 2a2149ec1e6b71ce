"""Random streams: every draw has a key, so that order, workers, processes and interruptions change nothing.

mmengine's and albumentations' own seeding repeats draws across epochs and workers (half of all augmentations were
duplicates): here one stream a sample from SeedSequence([use, seed, epoch, index]), about 30 µs each.
"""

import numpy as np

ORDER, SAMPLE, STEP, INIT, SPLIT = range(5)  # what a stream is for: part of its key


def stream(use: int, *key: int) -> np.random.Generator:
    """An independent generator for a use and a key of non-negative integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((use, *key))))


def torch_seed(use: int, *key: int) -> int:
    """A seed for torch's global generator, from the same kind of key."""
    return int(np.random.SeedSequence((use, *key)).generate_state(1, np.uint64)[0] >> 1)


class Order:
    """The endless order of training images: one permutation an epoch; any position is computed, none is replayed."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def at(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, index) of the `count` draws from position `start` on; a batch may straddle two epochs."""
        return [self._one(position) for position in range(start, start + count)]

    def _one(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.images)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, stream(ORDER, self.seed, epoch).permutation(self.images)
        return epoch, int(self._permutation[offset])
