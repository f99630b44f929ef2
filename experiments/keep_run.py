"""Copies of a live folder what it takes to predict its runs again, as it lies in experiments/measured.

``python -m experiments.keep_run outputs/live/live_cpu kept/live_cpu``: fleet.json and the calibrations that
it names, and of every measured run its requests, gaps, engine steps (Parquet) and run.json; not the raw
step logs, the servers' logs and the figures, which are larger or can be made again. The last line printed
is JSON: how many runs, files and bytes, and the largest file. Predict the copy with ``ersim-validate
folder=kept/live_cpu measure=false`` and what else the runs were measured with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ersim.errors import ConfigError, DataError, ErsimError
from experiments.validate import recorded_config, server_names
from testbed.fleet_calibration import FILE
from testbed.fleet_calibration import load as load_fleet
from testbed.measured_run import check_files

RUN = "run.json"
OF_ALL_RUNS = ("whole.json", "power.json")
OF_A_RUN = (RUN, "requests.parquet", "gaps.parquet", "steps_*.parquet")


def kept_files(folder: Path) -> Iterator[Path]:
    """The files to keep, relative to a live folder. Raises DataError for a run that is not whole."""
    fleet = load_fleet(folder)
    yield Path(FILE)
    for name in fleet.calibrations.values():
        yield Path(name)
    for name in OF_ALL_RUNS:
        if (folder / "runs" / name).is_file():
            yield Path("runs", name)
    runs = sorted(path.parent for path in folder.glob(f"runs/*/{RUN}"))
    if not runs:
        raise DataError(f"{folder}: no measured run in it; measure with ersim-validate")
    for run in runs:
        check_files(run, server_names(recorded_config(run / RUN).fleet))
        for pattern in OF_A_RUN:
            yield from (path.relative_to(folder) for path in sorted(run.glob(pattern)))


def keep(folder: Path, target: Path) -> dict[str, Any]:
    """Copy them to `target`, which comes into being whole or not at all; the figures of the last line."""
    if target.exists():
        raise ConfigError(f"{target} exists: name a folder that does not, nothing is written over")
    files = list(kept_files(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        for name in files:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, whole / name)
        whole.rename(target)
    sizes = {name: (target / name).stat().st_size for name in files}
    largest = max(sizes, key=lambda name: sizes[name])
    return {
        "command": "keep_run",
        "folder": str(target),
        "runs": sum(name.name == RUN for name in files),
        "files": len(files),
        "bytes": sum(sizes.values()),
        "largest": {"file": str(largest), "bytes": sizes[largest]},
    }


def main() -> int:
    """Entry point; 2 for options that cannot be, 1 for what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of a live study, with fleet.json and runs/")
    parser.add_argument("target", type=Path, help="a folder that does not exist")
    arguments = parser.parse_args()
    try:
        print(json.dumps(keep(arguments.folder, arguments.target)))
    except ErsimError as error:
        print(f"keep_run: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
