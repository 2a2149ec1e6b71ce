"""Random streams: every draw has a key, so that order, workers, processes and interruptions change nothing.

mmengine's and albumentations' own seeding repeats draws across epochs and workers (half of all augmentations were
duplicates): here one stream a sample from SeedSequence([use, seed, epoch, index]).
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.random.bit_generator import ISeedSequence

ORDER, SAMPLE, STEP, INIT, SPLIT = range(5)  # what a stream is for: part of its key


def stream(use: int, *key: int) -> Generator:
    """An independent generator for a use and a key of non-negative integers."""
    return Generator(PCG64(SeedSequence((use, *key))))


def torch_seed(use: int, *key: int) -> int:
    """A seed for torch's global generator, from the same kind of key."""
    return int(SeedSequence((use, *key)).generate_state(1, np.uint64)[0] >> 1)


class Streams(Sequence):
    """`stream(SAMPLE, seed, epoch, index)` for each (epoch, index) of `draws`, made when asked for.

    Many keys are hashed in one go: of 256, one costs a seventh of one made alone.
    """

    def __init__(self, seed: int, draws: Sequence[tuple[int, int]]) -> None:
        self.seed, self.draws = seed, draws
        self._few = len(draws) < 8  # to hash them together would cost more
        self._words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if self._few:
            return stream(SAMPLE, self.seed, *self.draws[at])
        if self._words is None:
            epochs, indices = np.array(self.draws, np.uint32).T
            self._words = seed_words([SAMPLE, *_split(self.seed), epochs, indices], len(self))
        return Generator(PCG64(_Known(self._words[at])))


class StepStreams:
    """`stream` and `torch_seed` of (STEP, seed, iteration, micro), hashed for 64 iterations at a time."""

    def __init__(self, seed: int, micros: range) -> None:
        self.seed, self.micros = seed, micros
        self._first, self._words = -1, np.empty(0, np.uint64)

    def at(self, iteration: int, micro: int) -> tuple[Generator, int]:
        """The generator and the seed of one micro-batch."""
        first = iteration - iteration % 64
        if first != self._first:
            count = 64 * len(self.micros)
            iterations = np.repeat(np.arange(first, first + 64), len(self.micros))
            key = [STEP, *_split(self.seed), iterations, np.tile(self.micros, 64)]
            self._first, self._words = first, seed_words(key, count).reshape(64, -1, 4)
        words = self._words[iteration - first, micro - self.micros.start]
        # a state's first word is the same at any length
        return Generator(PCG64(_Known(words))), int(words[0] >> np.uint64(1))


def _split(value: int) -> list[int]:
    """The 32-bit words of an integer, lowest first, as SeedSequence takes it."""
    return [value] if value < 2**32 else [value & 0xFFFFFFFF, *_split(value >> 32)]


class _Known(ISeedSequence):
    """A seed sequence whose state is computed already."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        return self.words  # PCG64 reads them as they lie in memory: a row of a C-ordered array


def seed_words(entropy: list[int | np.ndarray], count: int) -> np.ndarray:
    """`SeedSequence(key).generate_state(4, uint64)` of `count` keys at once: (count, 4).

    `entropy` is the key's 32-bit words, each one number for all keys or an array (count,). The algorithm is M. E.
    O'Neill's seed_seq_fe128 as numpy fixes it.
    """
    words = np.zeros((max(4, len(entropy)), count), np.uint32)
    for row, word in zip(words, entropy):
        row[:] = word
    constants = _powers(0x43B0D7E5, 0x931E8875, 4 * len(words) + 1)
    used = 4
    pool = _hashed(words[:4], constants[:5])
    for source in range(4):
        others = [target for target in range(4) if target != source]
        pool[others] = _mixed(pool[others], _hashed(pool[source], constants[used : used + 4]))
        used += 3
    for word in words[4:]:
        pool = _mixed(pool, _hashed(word, constants[used : used + 5]))
        used += 4
    state = _hashed(np.tile(pool, (2, 1)), _powers(0x8B51F9DD, 0x58F38DED, 9)).T.astype(np.uint64, order="C")
    return state[:, 0::2] | state[:, 1::2] << np.uint64(32)


@functools.cache
def _powers(start: int, factor: int, count: int) -> np.ndarray:
    return np.array([[start * pow(factor, k, 2**32) % 2**32] for k in range(count)], np.uint32)


def _hashed(values: np.ndarray, constants: np.ndarray) -> np.ndarray:
    values = (values ^ constants[:-1]) * constants[1:]
    return values ^ (values >> np.uint32(16))


def _mixed(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    values = one * np.uint32(0xCA01F9DD) - two * np.uint32(0x4973F715)
    return values ^ (values >> np.uint32(16))


class Order:
    """The endless order of training images: one permutation an epoch; any position is computed, none is replayed."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def at(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, index) of the `count` draws from position `start` on; a batch may straddle epochs."""
        draws: list[tuple[int, int]] = []
        while len(draws) < count:
            epoch, offset = divmod(start + len(draws), self.images)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = stream(ORDER, self.seed, epoch).permutation(self.images)
            indices = self._permutation[offset : offset + count - len(draws)].tolist()
            draws += [(epoch, index) for index in indices]
        return draws
