"""The `ersim` command: simulate one configuration, or sweep many.

`ersim` prints the summary of one run. `ersim -m users=1,10,100 fleet=a,b` sweeps.
`ersim experiment=flagship` is a sweep kept in a file. See `ersim --help`.
"""

# ruff: noqa: E402 (threads are limited before anything imports numpy)

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# One thread per process: results must not depend on the number of cores, and sweeps use the cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from ersim.errors import ErsimError
from ersim.util.files import to_json
from experiments.composition import quicken
from experiments.group_values import leave_on_bad_groups
from experiments.paths import conf_dir
from experiments.schema import register


def _task(config: DictConfig) -> None:
    """One job, in the folder that Hydra made for it; single runs print their summary."""
    from experiments.job import cores, run_job

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    single = settings.mode is not RunMode.MULTIRUN
    try:
        summary = run_job(config, folder, workers=cores() if single else 1)
    except ErsimError as error:
        if single:
            from experiments.single import log_failure

            log_failure(config, folder)
        raise CompactHydraException(str(error)) from error
    if not single:
        return
    from experiments.single import show_single

    try:
        show_single(config, summary, folder)
    except ErsimError as error:  # a store that cannot be used
        raise CompactHydraException(str(error)) from error


def main() -> None:
    """Run the command line in sys.argv; `calibration=list` shows what there is and simulates nothing."""
    if "calibration=list" in sys.argv[1:]:
        from experiments.calibrate import show_list

        print(to_json({"calibrations": show_list()}, indent=None))
        return
    try:
        conf = conf_dir()
    except ErsimError as error:
        print(f"ersim: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    leave_on_bad_groups("ersim", sys.argv[1:], conf, "config")
    gc.set_threshold(100_000, 20, 20)  # composing makes many small objects that stay: 0.3 s of collections
    register()
    quicken()
    command = hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(_task)
    try:
        command()
        gc.freeze()  # the interpreter need not look for cycles in what it is about to drop: 0.1 s
    except SystemExit as leaving:
        if leaving.code == 1 and "-sc" not in sys.argv and "--shell-completion" not in sys.argv:
            from experiments.hints import print_hints

            print_hints(sys.argv[1:], conf)
        raise
    except KeyboardInterrupt:
        print("ersim: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
