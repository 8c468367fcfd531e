"""Sites that are lost while something is asked of them, and when they are asked again.

A site is *lost* if its process or its connection ended: nothing is wrong with what it would have said. What it is asked
again is the same message, and its answer the same, because everything drawn depends on (seed, site, round, purpose) and
its private state is that of the round before. A site that answered, with an error of its own or with something that is
not usable, is not asked again in the same round.
"""

from __future__ import annotations

import math
from collections import Counter

PROCESS_ENDED = 1001
"""Our code of a client whose process ended under it."""

NODE_UNAVAILABLE = 5
"""Flower's code of a node that is not there."""

LOST = frozenset({3, 4, NODE_UNAVAILABLE, 8, PROCESS_ENDED})
"""Codes of lost sites. Flower's: the message or the reply is gone (3, 4), the node (5), its client process (8)."""

ATTEMPTS = 3
"""How often a message is given to a new process: one under which so many ended would end the next one too."""

PATIENCE_SECONDS = 600.0
"""How long lost sites are asked again if a run has no deadline."""

_LONGEST_PAUSE_SECONDS = 30.0


class Losses:
    """Which of the sites that were asked are lost.

    Args:
        mode: `needed`, `always` or `never`; see `Experiment.ask_again`.
        needed: How many sound answers there have to be.
        until: The time, on a monotonic clock, after which nobody is asked again.
    """

    def __init__(self, mode: str, needed: int, until: float) -> None:
        self.mode = mode
        self.needed = needed
        self.until = until
        self.reasons: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self._after: dict[str, float] = {}

    def take(self, site: str, code: int, reason: str, now: float) -> None:
        """Note that a site is lost."""
        self.asked[site] += 1
        self.reasons[site] = reason
        if code != PROCESS_ENDED:
            self._after[site] = now + min(_LONGEST_PAUSE_SECONDS, 2.0 ** (self.asked[site] - 1))
        else:
            self._after[site] = now if self.asked[site] < ATTEMPTS else math.inf

    def due(self, sound: int, pending: int, now: float) -> list[str]:
        """Return whom to ask again now; from then on they are not lost.

        Args:
            sound: How many sound answers there are.
            pending: How many sites may still answer.
            now: The time.
        """
        if not self._is_wanted(sound, pending) or now > self.until:
            return []
        found = sorted(site for site in self.reasons if self._after[site] <= now)
        for site in found:
            del self.reasons[site]
        return found

    def are_worth_waiting(self, sound: int, now: float) -> bool:
        """Return whether somebody will be asked again though nobody is pending."""
        soonest = min((self._after[site] for site in self.reasons), default=math.inf)
        return self._is_wanted(sound, 0) and now <= self.until and soonest <= self.until

    def final(self) -> dict[str, str]:
        """Return why sites are lost for good."""
        return {
            site: reason if self.asked[site] == 1 else f"{reason} (asked {self.asked[site]} times)"
            for site, reason in self.reasons.items()
        }

    def _is_wanted(self, sound: int, pending: int) -> bool:
        return self.mode == "always" or (self.mode == "needed" and sound + pending < self.needed)
