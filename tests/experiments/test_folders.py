"""Where results cannot be written is said before anything runs."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ersim.errors import ConfigError
from experiments import calibrate, route
from experiments.folders import check_file, check_folder

KERNELS_OWN = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="only Linux has it")


def test_a_folder_must_be_one_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists(), "nothing is made by asking"
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ConfigError, match=re.escape(f"folder={folder} cannot be made: {tmp_path}/file")):
            check_folder(folder)
    with pytest.raises(
        ConfigError, match=r"folder must be a folder that can be made and written, got \S+aaa \("
    ):
        check_folder(tmp_path / "b" / ("a" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]

    def refuse(*given: object, **named: object) -> None:  # as root all may be written
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match=re.escape(f"({tmp_path}: Permission denied); choose another")):
        check_folder(tmp_path / "a")


@KERNELS_OWN
def test_a_folder_that_not_even_root_can_make_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"folder must be .* written, got /proc/x \(/proc: .*\); choose another"
    ):
        check_folder(Path("/proc/x"))


def test_a_file_must_be_one_that_can_be_written(tmp_path: Path) -> None:
    check_file(tmp_path / "a" / "b.json", "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"^out must be a file to write, not a folder, got "):
        check_file(tmp_path, "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^out must be a file that can be written \(.*is a file; choose"):
        check_file(tmp_path / "file" / "a.json", "out")


@KERNELS_OWN
@pytest.mark.parametrize(
    "arguments",
    [("hydra.run.dir=/proc/x",), ("-m", "users=1,2", "hydra.sweep.dir=/proc/x")],
)
def test_a_simulation_is_refused_before_it_runs(arguments: tuple[str, ...], ersim: Callable) -> None:
    run = ersim(*arguments, "uncertainty=none", "workload.requests=150")
    assert run.code == 2 and not run.out
    key = arguments[-1].partition("=")[0]
    assert f"ersim: {key} must be a folder that can be made and written, got /proc/x (" in run.err
    assert "Traceback" not in run.err


@KERNELS_OWN
@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (route, ["eval", "name=/proc/x"], "ersim-route: name must be a folder that can be made and written"),
        (
            route,
            ["time", "hydra.run.dir=/proc/x"],
            "ersim-route: hydra.run.dir must be a folder that can be made",
        ),
        (route, ["fit", "out=/proc/x"], "ersim-route: out must be a file that can be written ("),
        (calibrate, ["source=roofline", "out=/proc/x"], "out must be a file that can be written ("),
    ],
)
def test_other_commands_too(
    command: object,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit):
        command.main()  # type: ignore[attr-defined]
    told = capfd.readouterr().err
    assert message in told and "Traceback" not in told


def test_a_store_that_cannot_be_used_is_no_traceback(ersim: Callable) -> None:
    uri = "tracking.uri=sqlite:////proc/x/y.db"
    run = ersim("uncertainty=none", "workload.requests=150", "tracking.enabled=true", uri)
    assert run.code == 1 and "files: " in run.out, "what was simulated is shown"
    assert "tracking.uri 'sqlite:////proc/x/y.db' cannot be used" in run.err and "Traceback" not in run.err
