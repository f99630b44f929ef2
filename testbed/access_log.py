"""Reads the gateway's access log: the gateway's clock readings of every request, by request id."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed.log_lines import NUMBER, TEXT, Kind, NotJson, maybe, read_lines

FIELDS: Mapping[str, Kind] = {
    "id": TEXT,
    **dict.fromkeys(("received_s", "routing_s", "queued_s"), NUMBER),
    **dict.fromkeys(("submitted_s", "first_in_s", "first_out_s"), maybe(NUMBER)),
}
"""What readers use of a record (see `testbed.gateway.exchange.Exchange.log_record`)."""


def read_access_log(path: Path) -> dict[str, dict[str, Any]]:
    """Records by request id; a last line that was cut off is ignored. Raises DataError for a bad file."""
    records: dict[str, dict[str, Any]] = {}
    cut: NotJson | None = None
    for line, record in read_lines(path, "an access log", "", "measure again"):
        if cut is not None:
            break
        if isinstance(record, NotJson):
            cut = record
            continue
        if not isinstance(record, dict):
            raise line.bad(f"must be a JSON object, got {reprlib.repr(record)}")
        for name, kind in FIELDS.items():
            if name not in record:
                raise line.bad(f"is no line of an access log: {name} is missing")
            line.check(name, kind, record[name])
        records[record["id"]] = record
    if cut is not None and cut.whole:
        raise cut.error
    return records
