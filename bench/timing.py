"""Interleaved rounds: every contestant once per round, in a rotating order, so that noise meets all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

SAMPLE_SECONDS = 2e-3  # a sample repeats a call until it is at least this long


def percentile(values: Sequence[float], share: float) -> float:
    """Return the linearly interpolated percentile, ``share`` in 0..1.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    return {f"p{n}": percentile(values, n / 100) for n in (20, 50, 80)}


class Rounds:
    """Times contestants in rounds, one sample of each per round.

    The contestant ``"ours"`` is left to pytest-benchmark, which calls `others` before and `ours` as the timed
    function of every round; without it, `run` does both.

    Args:
        contestants: name -> function of no arguments.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self, contestants: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.contestants = contestants
        self.clock = clock
        self.repeats = dict.fromkeys(contestants, 1)
        self.samples: dict[str, list[float]] = {name: [] for name in contestants}
        self.round_seconds = 0.0

    def warm_up(self) -> None:
        """Time every contestant, called before, to set the repeats of a sample and the length of a round."""
        self.round_seconds = 0.0
        for name, call in self.contestants.items():
            start = self.clock()
            call()
            elapsed = max(self.clock() - start, 1e-7)
            if elapsed < SAMPLE_SECONDS:  # one call of a fast function says little
                start = self.clock()
                for _ in range(5):
                    call()
                elapsed = max((self.clock() - start) / 5, 1e-7)
            self.repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / elapsed))
            self.round_seconds += elapsed * self.repeats[name]

    def rounds_within(self, seconds: float, least: int, most: int) -> int:
        """Return how many rounds fit into a time budget, between two bounds."""
        return max(least, min(most, int(seconds / max(self.round_seconds, 1e-6))))

    def _sample(self, name: str) -> None:
        call = self.contestants[name]
        start = self.clock()
        for _ in range(self.repeats[name]):
            call()
        self.samples[name].append((self.clock() - start) / self.repeats[name])

    def others(self) -> None:
        """Time every contestant but ours once; the order rotates from round to round."""
        names = [name for name in self.contestants if name != "ours"]
        if names:
            turn = len(self.samples[names[0]]) % len(names)
            for name in names[turn:] + names[:turn]:
                self._sample(name)

    def ours(self) -> None:
        """Time ours once."""
        self._sample("ours")

    def run(self, count: int) -> None:
        """Time ``count`` rounds of everyone."""
        for _ in range(count):
            self.others()
            self.ours()

    def ratios(self, name: str) -> list[float]:
        """Return the contestant's time over ours, round by round: above 1, ours is faster."""
        return [a / b for a, b in zip(self.samples[name], self.samples["ours"], strict=True)]
