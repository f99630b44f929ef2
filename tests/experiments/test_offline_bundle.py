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
from experiments.offline_bundle import ROOT, describe, pack, parser, project_files

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
    monkeypatch.setattr(offline_bundle, "project_files", lambda out: FILES)
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


def test_another_python_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"python": "3.9"}))
    done = _unpack(bundle, tmp_path / "there")
    assert done.returncode == 1 and "packed for Python 3.9, this is 3." in done.stderr


def test_files_to_drop_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_bundle, "project_files", lambda out: FILES)
    _wheel(tmp_path)
    with pytest.raises(ConfigError, match=r"--drop must match files of the vLLM wheel, got vllm/none\*"):
        pack(tmp_path, tmp_path, PIECE_BYTES, ["vllm/none*"])


def test_a_checkout_is_packed_whole_and_nothing_else() -> None:
    names = project_files(ROOT / "docs")
    assert {"conf/config.yaml", "experiments/gpu_session.py", "testbed/recording_scheduler.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "outputs", "build"))]
    assert not [name for name in names if name.startswith("docs/")]  # as if the bundle were written there


def test_arguments_come_from_a_file_with_comments() -> None:
    path = ROOT / "experiments" / "bundle_hopper.txt"
    arguments = parser().parse_args([f"@{path}", "--out", "x"])
    assert arguments.vllm and arguments.piece_mib == 55
    assert all("#" not in text and " " not in text for text in (*arguments.leave_out, *arguments.drop))
    assert "vllm/vllm_flash_attn/_vllm_fa2_C*" in arguments.drop
