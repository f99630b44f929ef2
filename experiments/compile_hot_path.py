"""Build the compiled hot path (`make fast`): optional, needs a C compiler, gives the same results sooner.

    python -m experiments.compile_hot_path

What is built and how it is found again stands in `ersim/compiled.py`. Without a C compiler or without
mypyc (it comes with mypy) this says so in one line, and ersim stays interpreted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ersim.compiled import GROUP, MODULES, ROOT, binaries, built_folder, source_file

# -ffp-contract=off: a fused multiply-add rounds once instead of twice, so results would differ.
FLAGS = "-O3 -g0 -ffp-contract=off -fno-strict-aliasing -Wno-unused-function"


def build(target: Path) -> None:
    """Compile `MODULES` into `target`; runs in a process of its own."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    os.chdir(ROOT)
    sources = [str(source_file(module).relative_to(ROOT)) for module in MODULES]
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--config-file", "pyproject.toml", "--no-warn-unused-ignores"]
        modules = mypycify([*options, *sources], group_name=GROUP, target_dir=scratch, debug_level="0")
        command = build_ext(Distribution({"name": GROUP, "ext_modules": modules}))
        command.build_lib, command.build_temp = str(target), scratch
        command.ensure_finalized()
        command.run()


def main() -> int:
    """Build unless the binaries of the present sources are there already; always 0, for it is optional."""
    folder = built_folder()
    if binaries(folder):
        print(f"compiled already: {folder.relative_to(ROOT)}")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    program = "import sys; from experiments.compile_hot_path import *; build(Path(sys.argv[1]))"
    environment = {**os.environ, "ERSIM_INTERPRETED": "1", "CFLAGS": FLAGS}
    command = [sys.executable, "-c", program, str(unfinished)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not binaries(unfinished):
        shutil.rmtree(unfinished)
        print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), file=sys.stderr)
        print("not compiled (it needs a C compiler and mypy): ersim stays interpreted, which is only slower")
        return 0
    for old in folder.parent.iterdir():
        if old != unfinished:
            shutil.rmtree(old)
    unfinished.rename(folder)
    print(f"compiled {len(MODULES)} modules: {folder.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
