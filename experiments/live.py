"""`make live`: profile two small experts on this CPU, run them live at each load, compare.

``python -m experiments.live [overrides]`` passes its arguments to both commands where they apply:
``users=``, ``seconds=``, ``warmup_s=``, ``repeats=`` and ``replications=`` to the validation,
``live_plan=`` and ``plan.*`` to the profile, everything else to both. What ends or kills it ends the
command that runs, and that one's servers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from ersim.errors import ErsimError
from experiments.long_command import run_to_its_end
from experiments.session_check import check_first

VALIDATE_ONLY = ("users", "seconds", "warmup_s", "repeats", "replications")
PROFILE_ONLY = ("live_plan", "plan", "install")
REFUSED = 2


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(for the profile, for the validation)."""
    first, second = [], []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0].partition(".")[0]
        if key not in VALIDATE_ONLY:
            first.append(argument)
        if key not in PROFILE_ONLY:
            second.append(argument)
    return first, second


def main() -> int:
    """Run both commands; the last line printed is the validation's JSON. Returns the first bad status.

    REFUSED when neither ran, because one of them would refuse its arguments.
    """
    arguments = sys.argv[1:]
    if not any(argument.startswith(("fleet=", "expert=")) for argument in arguments):
        arguments = ["fleet=live_cpu", *arguments]
    began_s = time.monotonic()
    profile, validate = split_arguments(arguments)
    try:
        check_first(profile, validate)
    except ErsimError as error:
        print(f"live: {error}", file=sys.stderr)
        return REFUSED
    for module, chosen in (("experiments.profile", profile), ("experiments.validate", validate)):
        status, _ = run_to_its_end([sys.executable, "-m", module, *chosen])
        if status:
            return status
    print(f"both together took {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
