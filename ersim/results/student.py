"""Quantiles of Student's t distribution, without scipy: importing it takes a fifth of a second."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=256)
def t_quantile(degrees: int, probability: float) -> float:
    """The value that Student's t with `degrees` (>= 1) degrees of freedom stays below with `probability`.

    Solved by bisection of the two-sided probability A(t | degrees) in theta = atan(t / sqrt(degrees));
    accurate to about 1e-12. ValueError for degrees below 1 or a probability outside (0, 1).
    """
    if degrees < 1 or not 0.0 < probability < 1.0:
        raise ValueError(f"need degrees >= 1 and 0 < probability < 1, got {degrees} and {probability}")
    if probability < 0.5:
        return -t_quantile(degrees, 1.0 - probability)
    wanted, low, high = 2.0 * probability - 1.0, 0.0, 0.5 * math.pi
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:  # no double between them
            return math.sqrt(degrees) * math.tan(low)
        low, high = (middle, high) if _within(middle, degrees) < wanted else (low, middle)


def _within(theta: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(theta)): Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + odd, degrees, 2):
        term *= square * (power - 1) / power
        total += term
    return 2.0 / math.pi * (theta + sine * total) if odd else sine * total
