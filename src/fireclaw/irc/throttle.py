"""How fast we may speak, and how often somebody may command. Sans-I/O: the clock is the caller's.

Two lines a second with a burst of four, and one token for each 256 bytes begun, stays under ngircd's penalties
(measured: 200 bytes each 0.5 s or 400 bytes each second are relayed within 60 ms; faster builds up delay).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

_BYTES_A_TOKEN = 256
_MINUTE_S = 60.0


@dataclass(frozen=True)
class Rate:
    """How fast we may speak.

    Attributes:
        per_second: tokens that come back each second.
        burst: tokens in a full bucket.
    """

    per_second: float = 2.0
    burst: int = 4


class TokenBucket:
    """When the next line may go.

    A line goes as soon as there is one token and is paid for afterwards, so a long one puts us in debt: nobody
    has to know the next line's size to know when it may go.
    """

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._tokens = float(rate.burst)
        self._at = now

    def delay(self, now: float) -> float:
        """Seconds until the next line may go; 0 for at once."""
        return max(0.0, (1.0 - self._refilled(now)) / self._rate.per_second)

    def pay(self, size: int, now: float) -> None:
        """Pay for a line of ``size`` bytes."""
        self._tokens = self._refilled(now) - max(1, math.ceil(size / _BYTES_A_TOKEN))
        self._at = now

    def _refilled(self, now: float) -> float:
        return min(self._rate.burst, self._tokens + (now - self._at) * self._rate.per_second)


class Verdict(Enum):
    """What to do with one more command."""

    SERVE = auto()
    REFUSE = auto()
    IGNORE = auto()


class CommandLimit:
    """So many commands in any minute for each person: the first one too many is refused, the rest ignored."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: dict[str, deque[float]] = {}

    def judge(self, who: str, now: float) -> Verdict:
        """Count one command.

        Args:
            who: whose it is, folded.
            now: monotonic seconds.
        """
        self._forget_before(now - _MINUTE_S)
        times = self._times.setdefault(who, deque())
        if len(times) > self._per_minute:
            return Verdict.IGNORE
        times.append(now)
        return Verdict.SERVE if len(times) <= self._per_minute else Verdict.REFUSE

    def _forget_before(self, then: float) -> None:
        for who, times in list(self._times.items()):
            while times and times[0] <= then:
                times.popleft()
            if not times:
                del self._times[who]
