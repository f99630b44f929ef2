"""A bundle of one small wheel and a few files: packed into pieces, carried, unpacked by its own script."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ersim.errors import ConfigError
from experiments import offline_bundle
from experiments.offline_bundle import ROOT, describe, main, pack, parser, project_files
from experiments.offline_packages import Package

FILES = ["pyproject.toml", "ersim/errors.py", "experiments/bundle_hopper.txt"]
PIECE_BYTES = 1000


def _wheel(folder: Path) -> None:
    info = "vllm-9.0.dist-info"
    with zipfile.ZipFile(folder / "vllm-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "VERSION = 9\n")
        wheel.writestr("vllm/kernels_fa2_C.so", "x" * 4000)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 9.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        records = [f"{info}/METADATA,,", f"{info}/WHEEL,,", "vllm/__init__.py,,", "vllm/kernels_fa2_C.so,,"]
        wheel.writestr(f"{info}/RECORD", "\n".join([*records, f"{info}/RECORD,,", ""]))


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(offline_bundle, "project_files", lambda: FILES)
    wheels, out = tmp_path / "wheels", tmp_path / "bundle"
    wheels.mkdir()
    out.mkdir()
    _wheel(wheels)
    describe(out, pack(wheels, out, PIECE_BYTES, ["*_fa2_C*"]), ["vllm==9.0"])
    return out


def _unpack(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "unpack.py"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_packed_is_there_and_can_be_imported(bundle: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(bundle.glob("bundle.*"))]
    assert len(sizes) > 1 and max(sizes) <= PIECE_BYTES and set(sizes[:-1]) == {PIECE_BYTES}
    done = _unpack(bundle, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "there" / "site"
    assert done.stdout.splitlines() == [f"export PYTHONPATH={site}", f"cd {tmp_path / 'there' / 'ersim'}"]
    assert not list(site.rglob("*fa2*"))
    for name in FILES:
        assert (tmp_path / "there" / "ersim" / name).read_bytes() == (ROOT / name).read_bytes()
    code = "import importlib.metadata, vllm; print(vllm.VERSION, importlib.metadata.version('vllm'))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "9 9.0\n"


def test_a_second_time_does_nothing(bundle: Path, tmp_path: Path) -> None:
    assert _unpack(bundle, tmp_path / "there").returncode == 0
    (tmp_path / "there" / "site" / "kept").touch()
    (bundle / "bundle.0").unlink()  # as where pieces are removed once they are unpacked
    assert _unpack(bundle, tmp_path / "there").returncode == 0
    assert (tmp_path / "there" / "site" / "kept").exists()


def test_missing_and_damaged_pieces_are_named(bundle: Path, tmp_path: Path) -> None:
    (bundle / "bundle.0").unlink()
    with open(bundle / "bundle.1", "r+b") as piece:
        piece.write(b"?")
    done = _unpack(bundle, tmp_path / "there")
    assert done.returncode == 1
    assert "bundle.0 is missing, bundle.1 is damaged: copy again to" in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_missing_manifest_is_named(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").unlink()
    assert "manifest.json is missing: copy it to" in _unpack(bundle, tmp_path / "there").stderr


def test_what_no_bundle_left_there_stays(bundle: Path, tmp_path: Path) -> None:
    mine = tmp_path / "there" / "ersim" / "mine"
    mine.mkdir(parents=True)
    done = _unpack(bundle, tmp_path / "there")
    assert done.returncode == 1 and "holds ersim, which no bundle left there: choose another" in done.stderr
    assert mine.is_dir()


def test_another_bundle_keeps_what_was_measured_with_the_one_before(bundle: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    assert _unpack(bundle, there).returncode == 0
    (there / "ersim" / "outputs").mkdir()
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"packages": ["another"]}))
    assert _unpack(bundle, there).returncode == 0
    assert (there / "ersim.previous" / "outputs").is_dir() and not (there / "ersim" / "outputs").exists()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = _unpack(bundle, there)
    assert done.returncode == 1 and "ersim.previous is there already: move it away first" in done.stderr


def test_another_python_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"python": "3.9"}))
    done = _unpack(bundle, tmp_path / "there")
    assert done.returncode == 1 and "packed for Python 3.9, this is 3." in done.stderr


def test_files_to_drop_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_bundle, "project_files", lambda: FILES)
    _wheel(tmp_path)
    with pytest.raises(ConfigError, match=r"--drop must match files of the vLLM wheel, got vllm/none\*$"):
        pack(tmp_path, tmp_path, PIECE_BYTES, ["vllm/none*", "*_fa2_C*"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--python", "3.8"], "--python must be this interpreter's"),
        (["--drop", "x"], "--drop has no effect without --vllm"),
        (["--out", str(ROOT)], "--out must be a folder for the bundle alone"),
        (["--out", str(ROOT / "ersim")], "--out must be a folder for the bundle alone"),
        (["--out", "/proc/x"], "--out must be a folder that can be made and written"),
        (["--out", str(ROOT / "README.md")], "README.md is a file; choose another"),
        (["--there", "/none"], "--there must be a file of"),
    ],
)
def test_what_can_be_known_is_refused_before_anything_is_fetched(
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(offline_bundle, "resolve", lambda wanted: pytest.fail("resolved"))
    monkeypatch.setattr(sys, "argv", ["offline_bundle", "--out", str(tmp_path / "b"), *given])
    assert main() == 2
    assert said in capsys.readouterr().err


def test_packages_to_leave_out_must_be_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline_bundle, "resolve", lambda wanted: {"simpy": Package("simpy", "4.1")})
    monkeypatch.setattr(sys, "argv", ["offline_bundle", "--out", str(tmp_path), "--leave-out", "simpy,flash"])
    assert main() == 2
    assert "--leave-out must name packages that are needed, got flash" in capsys.readouterr().err


def test_a_checkout_is_packed_whole_and_nothing_else() -> None:
    names = project_files()
    assert {"conf/config.yaml", "experiments/gpu_session.py", "testbed/recording_scheduler.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "outputs", "build"))]


def test_arguments_come_from_a_file_with_comments() -> None:
    path = ROOT / "experiments" / "bundle_hopper.txt"
    arguments = parser().parse_args([f"@{path}", "--out", "x"])
    assert arguments.vllm and arguments.piece_mib == 45
    checkout_mib = sum((ROOT / name).stat().st_size for name in project_files()) / 2**20
    assert arguments.piece_mib + checkout_mib < 64, "with the project, where so much is taken at once"
    assert all("#" not in text and " " not in text for text in (*arguments.leave_out, *arguments.drop))
    assert "vllm/vllm_flash_attn/_vllm_fa2_C*" in arguments.drop
