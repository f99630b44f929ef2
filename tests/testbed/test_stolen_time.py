"""Stolen time as Linux counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.stolen_time import LARGEST, STAT, StolenShare


def write(path: Path, user: int, system: int, idle: int, steal: int) -> None:
    path.write_text(f"cpu  {user} 0 {system} {idle} 5 0 0 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")


def test_the_share_is_that_of_the_last_second_of_wanted_time(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    write(stat, 1000, 100, 9000, 500)
    share = StolenShare(stat)
    assert share(10.0) == 0.0
    write(stat, 1070, 110, 9080, 520)
    assert share(10.5) == 0.0, "too soon to tell"
    assert share(11.0) == pytest.approx(20 / 100), "idle time was not wanted"
    write(stat, 1170, 110, 9080, 520)
    assert share(11.5) == pytest.approx(20 / 100)
    assert share(12.0) == 0.0
    write(stat, 1170, 110, 9280, 520)
    assert share(13.0) == 0.0, "an idle second"
    write(stat, 1170, 110, 9280, 920)
    assert share(14.0) == LARGEST
    write(stat, 1270, 110, 9280, 900)
    assert share(15.0) == 0.0, "a count that went back"


@pytest.mark.parametrize("text", [None, "", "cpu  1 2 3 4\n", "cpu a b c d e f g h\n"])
def test_where_nobody_counts_nothing_is_stolen(tmp_path: Path, text: str | None) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    share = StolenShare(stat)
    assert [share(float(second)) for second in range(3)] == [0.0, 0.0, 0.0]


@pytest.mark.skipif(not STAT.exists(), reason="no Linux")
def test_this_machine_can_be_read() -> None:
    share = StolenShare()
    assert all(0.0 <= share(float(second)) <= LARGEST for second in range(3))
