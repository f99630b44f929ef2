"""The generator against its published test vectors, and its draws against the uniform distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ersim.workload.philox import key_of, philox_4x32, uniforms

# Known answers of Random123 1.14, file kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, answer: str) -> None:
    words = philox_4x32(
        tuple(np.array([int(word, 16)], np.uint64) for word in counter.split()),  # type: ignore[arg-type]
        tuple(int(word, 16) for word in key.split()),  # type: ignore[arg-type]
    )
    assert [f"{int(word[0]):08x}" for word in words] == answer.split()


def test_draws_are_uniform_and_unrelated_along_users_rounds_and_lanes() -> None:
    lanes = uniforms(key_of(7), np.arange(400)[None, :], np.arange(250)[:, None], 0)
    for lane in lanes:
        assert stats.kstest(lane.ravel(), "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(lane[:-1].ravel(), lane[1:].ravel())[0, 1]) < 0.01
        assert abs(np.corrcoef(lane[:, :-1].ravel(), lane[:, 1:].ravel())[0, 1]) < 0.01
    pairs = np.corrcoef([lane.ravel() for lane in lanes]) - np.eye(4)
    assert np.abs(pairs).max() < 0.02


def test_a_draw_depends_on_its_own_coordinates_only() -> None:
    key = key_of(3)
    block = uniforms(key, np.arange(50)[None, :], np.arange(20)[:, None], 0)
    alone = uniforms(key, np.array([17]), np.array([11]), 0)
    assert [lane[11, 17] for lane in block] == [lane[0] for lane in alone]


def test_other_seeds_and_streams_give_other_draws() -> None:
    users, rounds = np.arange(100), np.zeros(1, np.int64)
    base = uniforms(key_of(0), users, rounds, 0)[0]
    assert not np.isin(uniforms(key_of(1), users, rounds, 0)[0], base).any()
    assert not np.isin(uniforms(key_of(0), users, rounds, 1)[0], base).any()
    assert not np.isin(uniforms(key_of(2**80), users, rounds, 0)[0], base).any()
