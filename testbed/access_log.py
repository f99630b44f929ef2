"""Reads the gateway's access log: the gateway's clock readings of every request, by request id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ersim.errors import DataError


def read_access_log(path: Path) -> dict[str, dict[str, Any]]:
    """Records by request id; a last line that was cut off is ignored. Raises DataError for a bad file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: access log cannot be read ({error})") from error
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(f"{path}: line {number} is not JSON ({error.msg})") from error
        records[record["id"]] = record
    return records
