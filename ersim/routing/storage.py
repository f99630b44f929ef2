"""A fitted policy as one file: a JSON header line, then the pickled object, checked by a digest.

Pickle runs code when it is read: load only files that you made or trust.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ersim.errors import ConfigError, DataError
from ersim.routing.own_code import look_in_working_directory
from ersim.routing.policy import Policy
from ersim.util.files import write_atomically

MAGIC = "ersim-policy"
FORMAT = 1


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    found = {}
    for package in ("numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save_policy(policy: Policy, path: Path) -> None:
    """Write `policy` to `path` atomically; creates the folder."""
    body = pickle.dumps(policy, protocol=5)
    header = {
        "magic": MAGIC,
        "format": FORMAT,
        "policy": policy.name,
        "experts": list(policy.experts),
        "versions": _versions(),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    content = json.dumps(header).encode() + b"\n" + body

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def read_header(path: Path | str) -> dict[str, Any]:
    """The header of a policy file without loading the policy; DataError if it is none."""
    try:
        with Path(path).open("rb") as file:
            line = file.readline(100_000)
    except OSError as error:
        raise DataError(
            f"policy file {path} cannot be read: {error.strerror}; make it with ersim-route fit"
        ) from error
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise DataError(f"{path} is not a policy file: make one with ersim-route fit")
    if header.get("format") != FORMAT:
        raise DataError(f"{path}: format must be {FORMAT}, got {header.get('format')!r}; fit it again")
    experts, digest = header.get("experts"), header.get("sha256")
    if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
        raise DataError(f"{path}: experts must be a list of names, got {experts!r}; fit it again")
    if not isinstance(digest, str):
        raise DataError(f"{path}: sha256 must be the policy's digest, got {digest!r}; fit it again")
    return header


def load_policy(path: Path | str, experts: Sequence[str]) -> Policy:
    """Read a saved policy for a fleet whose experts are `experts`, in order.

    DataError: no such file, not a policy file, damaged or cut. ConfigError: trained for others.
    """
    header = read_header(path)
    if header["experts"] != list(experts):
        raise ConfigError(
            f"router.policy_path {path}: the policy was trained for experts "
            f"[{', '.join(header['experts'])}], "
            f"but the fleet has [{', '.join(experts)}], in that order; fit it again for this fleet"
        )
    body = Path(path).read_bytes().partition(b"\n")[2]
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise DataError(f"{path} is damaged (digest mismatch, perhaps cut off): fit the policy again")
    look_in_working_directory()  # where a user's own class may be
    try:
        policy = pickle.loads(body)
    except Exception as error:  # unpickling can raise anything when classes have moved
        raise DataError(
            f"{path} cannot be loaded here ({error}); it was made with {header.get('versions')}: fit it again"
        ) from error
    if not isinstance(policy, Policy):
        raise DataError(f"{path} holds a {type(policy).__name__}, not a routing policy")
    return policy
