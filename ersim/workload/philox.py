"""Counter-based random numbers: draw any user's any request without drawing those before it.

Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), over whole arrays of counters at once. numpy has Philox too, but only as a sequential
stream; here the counter is the request's own coordinates (user, round), so that a request does
not depend on who else asked, on the order of asking, or on how many users there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


def philox_4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, ...]:
    """Four 32-bit random words (in uint64 arrays) for each counter of four 32-bit words.

    The counter words broadcast against each other; `key` is two 32-bit words.
    """
    x0, x1, x2, x3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * x0
        product_1 = _MULTIPLIER_1 * x2
        x0 = (product_1 >> _HALF) ^ x1 ^ np.uint64(key_0)
        x1 = product_1 & _LOW
        x2 = (product_0 >> _HALF) ^ x3 ^ np.uint64(key_1)
        x3 = product_0 & _LOW
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    return x0, x1, x2, x3


def key_of(seed: int) -> tuple[int, int]:
    """Philox key of a seed of any size (>= 0), spread by numpy's SeedSequence."""
    first, second = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    return int(first), int(second)


def uniforms(
    key: tuple[int, int], users: npt.NDArray[np.int64], rounds: npt.NDArray[np.int64], stream: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """Four independent uniforms in (0, 1), each of shape `broadcast(users, rounds)`.

    One quadruple per (user, round, stream); users below 2**32, rounds below 2**64. Neither 0 nor
    1 occurs, so every quantile function may be applied.
    """
    users_64 = users.astype(np.uint64)
    rounds_64 = rounds.astype(np.uint64)
    users_64, rounds_64 = np.broadcast_arrays(users_64, rounds_64)
    words = philox_4x32(
        (rounds_64 & _LOW, rounds_64 >> _HALF, users_64, np.full(users_64.shape, stream, np.uint64)), key
    )
    return tuple((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words)
