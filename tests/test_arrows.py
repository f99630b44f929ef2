"""Imports point one way: experiments -> testbed -> ersim, and inside ersim to the shared types only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("workload", "routing", "engine", "steptime", "results")
SHARED = ("types", "config", "errors", "util")
OUTSIDE_ERSIM = {"hydra", "mlflow", "vllm", "aiohttp", "torch", "pynvml", "testbed", "experiments"}


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", python_files("ersim"), ids=lambda path: str(path.relative_to(ROOT)))
def test_ersim_knows_no_network_no_vllm_no_hydra_no_mlflow(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & OUTSIDE_ERSIM


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_share_types_and_nothing_else(room: str) -> None:
    files = python_files(f"ersim/{room}")
    assert files, f"room {room} is empty"
    allowed = {room, *SHARED}
    for file in files:
        inner = {name.split(".")[1] for name in imports(file) if name.startswith("ersim.")}
        assert inner <= allowed, f"{file.relative_to(ROOT)} imports {sorted(inner - allowed)}"


def test_only_the_system_room_knows_simpy() -> None:
    for file in python_files("ersim"):
        if "simpy" in {name.split(".")[0] for name in imports(file)}:
            assert file.parent.name == "system", file


def test_testbed_knows_neither_experiments_nor_hydra_nor_mlflow() -> None:
    for file in python_files("testbed"):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & {"experiments", "hydra", "mlflow"}, file


def test_mlflow_folder_does_not_shadow_the_package() -> None:
    assert not (ROOT / "mlflow" / "__init__.py").exists()
