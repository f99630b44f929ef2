"""What a machine without an index lacks: read from pip's own kind of report, walked down to what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ersim.errors import ConfigError, DataError
from experiments.offline_packages import needed, pip, read_installed, read_report, unmet


def _item(name: str, version: str, *requires: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "version": version, "requires_dist": list(requires)}}


PACKAGES = read_report(
    {
        "install": [
            _item(
                "vllm", "0.26.0", "torch==2.11.0", "fastapi[standard]", "msgspec", 'six; python_version < "3"'
            ),
            _item("torch", "2.11.0", "nvidia-cublas", "sympy"),
            _item("nvidia-cublas", "13"),
            _item("sympy", "1.14", "mpmath"),
            _item("mpmath", "1.3"),
            _item(
                "fastapi",
                "0.136",
                "Typing_Extensions",
                'uvicorn; extra == "standard"',
                'ujson; extra == "all"',
            ),
            _item("typing-extensions", "4.15"),
            _item("uvicorn", "0.54"),
            _item("ujson", "5"),
            _item("six", "1.17"),
            _item("msgspec", "0.22"),
            _item("simpy", "4.1.2"),
        ]
    }
)


def test_only_what_is_reached_beside_what_is_there_is_carried() -> None:
    names = [one.pinned for one in needed(["vllm==0.26.0", "simpy>=4"], PACKAGES, {"torch"})]
    expected = ["fastapi==0.136", "msgspec==0.22", "simpy==4.1.2", "typing-extensions==4.15", "uvicorn==0.54"]
    assert names == [
        *expected,
        "vllm==0.26.0",
    ]  # neither torch nor what only torch needs, no extra unasked for


def test_what_two_need_is_carried_for_the_one_that_is_not_there() -> None:
    wanted = ["torch", "sympy"]
    assert [one.name for one in needed(wanted, PACKAGES, {"torch"})] == ["mpmath", "sympy"]


def test_installed_is_read_as_pip_lists_it(tmp_path: Path) -> None:
    path = tmp_path / "there.txt"
    path.write_text(
        "# head\nnumpy==2.5.2\ntorch===2.11.0+cu130\nPy_Yaml\n-e git+ssh://x\nown @ file:///x\n\n"
    )
    assert read_installed(path) == {"numpy": "2.5.2", "torch": "2.11.0+cu130", "py-yaml": None, "own": None}


@pytest.mark.parametrize("line", ["numpy 2.5.2", "==3", "a b c"])
def test_another_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "there.txt"
    path.write_text(f"simpy\n{line}\n")
    with pytest.raises(DataError, match=r"there\.txt: line 2 must be NAME or NAME==VERSION, got"):
        read_installed(path)
    with pytest.raises(ConfigError, match="--there must be a file of `pip list"):
        read_installed(tmp_path / "none.txt")


def test_another_release_than_is_asked_for_is_said() -> None:
    carried = needed(["vllm"], PACKAGES, {"torch"})
    local = {"torch": "2.11.0+cu130", "six": "1"}  # a local version meets its release
    assert unmet(["vllm"], carried, local) == []
    told = unmet(["vllm", "numpy>=2"], carried, {"torch": "2.10.0", "numpy": "1.26"})
    assert told == [
        "numpy 1.26 is there, ersim asks for >=2",
        "torch 2.10.0 is there, vllm==0.26.0 asks for ==2.11.0",
    ]


def test_a_failure_of_pip_is_told_with_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"pip no-such-command failed:\n.*no-such-command"):
        pip("no-such-command")
