"""Read CSV, JSONL and Parquet files as tables, and check their columns, with errors a user can act on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def _read_jsonl(path: Path) -> pd.DataFrame:
    """One JSON object a line; blank lines are skipped. ValueError names the line that is none."""
    import pandas as pd

    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        rows.append(row)
    return pd.DataFrame.from_records(rows)


def _read_csv(path: Path) -> pd.DataFrame:
    """Only empty and NaN fields are missing: a prompt may well say NA, None or null."""
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=["", "NaN", "nan"])


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path)


MOST = 10**12
"""No count of tokens is above this; a larger number is a damaged one."""

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".jsonl": _read_jsonl,
}


def _suffix(path: Path) -> str:
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), "")


def read_table(path: str | Path, key: str) -> pd.DataFrame:
    """The table in a .parquet, .csv, .csv.gz or .jsonl file; `key` is the config key that named it.

    Raises DataError when the file is missing, empty, of another type, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{key}: no such file: {path} (relative to {Path.cwd()})")
    suffix = _suffix(path)
    if not suffix:
        raise DataError(f"{key}: {path} must end in one of: {', '.join(READERS)}")
    try:
        table = READERS[suffix](path)
    except (ValueError, OSError, UnicodeError) as error:
        # pyarrow's ArrowInvalid and pandas' EmptyDataError and ParserError are ValueErrors too
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{key}: {path} cannot be read as {suffix[1:]}: {reason}") from error
    if table.empty:
        raise DataError(f"{key}: {path} holds no rows")
    return table


def find_column(table: pd.DataFrame, names: Iterable[str]) -> str | None:
    """The first of `names` that the table has, ignoring case; None when it has none of them."""
    lower = {str(column).lower(): str(column) for column in table.columns}
    return next((lower[name] for name in names if name in lower), None)


def require_column(table: pd.DataFrame, column: str, path: str | Path, key: str) -> pd.Series:
    """That column; DataError naming the file, the key that asked for it and the columns there are."""
    if column not in table.columns:
        there = ", ".join(str(name) for name in table.columns)
        raise DataError(f"{path} has no column {column!r} (asked for by {key}); its columns are: {there}")
    return table[column]


def whole_numbers(values: pd.Series, path: str | Path, least: int) -> npt.NDArray[np.int64]:
    """The column as integers >= least, shape (rows,); DataError names the first row that is not one.

    Rows are counted from 1, without the header.
    """
    numbers = _numbers(values)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (numbers >= least) & (numbers <= MOST)
    _refuse_first(good, values, path, f"a whole number >= {least}")
    return np.asarray(numbers, np.int64)


def real_numbers(
    values: pd.Series, path: str | Path, low: float = -np.inf, high: float = np.inf
) -> npt.NDArray[np.float64]:
    """The column as finite numbers in [low, high], shape (rows,); DataError names the first that is not."""
    numbers = _numbers(values)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(numbers) & (numbers >= low) & (numbers <= high)
    _refuse_first(good, values, path, f"a finite number in [{low}, {high}]")
    return numbers


def _numbers(values: pd.Series) -> npt.NDArray[np.float64]:
    """The column as floats, NaN where a value is no number."""
    import pandas as pd

    return np.asarray(pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan))


def _refuse_first(good: npt.NDArray[np.bool_], values: pd.Series, path: str | Path, must: str) -> None:
    if good.all():
        return
    row = int(np.argmin(good))
    got = values.iloc[row]
    got = got.item() if isinstance(got, np.generic) else got
    raise DataError(f"{path}: row {row + 1}: {values.name} must be {must}, got {got!r}")


def texts(values: pd.Series, path: str | Path) -> Sequence[str]:
    """The column as non-empty strings; DataError names the first row that is none."""
    good = np.array([isinstance(value, str) and bool(value.strip()) for value in values], np.bool_)
    _refuse_first(good, values, path, "a non-empty text")
    return list(values)
