"""Prompt sets: what is asked, in which domain, and which model answers it well where that is known.

The built-in set in `data/prompts/` was written for this project. Nobody has graded answers to it, so
its prompts carry no quality; sets with graded answers load by path.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ersim.config import PromptSetConfig
from ersim.errors import bad_value
from ersim.types import Prompt
from ersim.workload.tables import read_table, real_numbers, require_column, texts, whole_numbers

if TYPE_CHECKING:
    import pandas as pd

BYTES_PER_TOKEN = 3.94
"""UTF-8 bytes of English text per Llama 3 token: Grattafiori et al., "The Llama 3 Herd of Models"
(2024), section 3.2, report 3.94 characters per token on their English sample. Bytes, not characters,
so that scripts outside ASCII, which cost more tokens a character, are not grossly undercounted."""

KEY = "workload.prompts"
NO_DOMAIN = "unknown"


def estimate_tokens(text: str) -> int:
    """Tokens of a text when no tokenizer is at hand: its UTF-8 bytes / BYTES_PER_TOKEN, at least 1.

    An estimate for English prose; code and tables run up to a third higher.
    """
    return max(1, math.ceil(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN))


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a name; `digest` identifies their content."""

    name: str
    prompts: list[Prompt]

    @cached_property
    def domains(self) -> list[str]:
        """Names of the domains that occur, sorted."""
        return sorted({prompt.domain for prompt in self.prompts})

    @cached_property
    def models(self) -> list[str]:
        """Names of the models of which any prompt has a quality, sorted."""
        return sorted({model for prompt in self.prompts for model in prompt.quality})

    @cached_property
    def own_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt's own text, shape (prompts,): as the set says, else estimated."""
        return np.array(
            [
                estimate_tokens(prompt.text) if prompt.prompt_tokens is None else prompt.prompt_tokens
                for prompt in self.prompts
            ],
            np.int64,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that the set says, in order, whatever file format it came from."""
        sha = hashlib.sha256()
        for prompt in self.prompts:
            row = [
                prompt.text,
                prompt.domain,
                prompt.prompt_tokens,
                prompt.output_tokens,
                sorted(prompt.quality.items()),
            ]
            sha.update(json.dumps(row, ensure_ascii=True).encode())
        return sha.hexdigest()

    def identity(self) -> dict[str, str | int]:
        """Name, digest and number of prompts, as summaries and the tracking store hold them."""
        return {"name": self.name, "digest": self.digest, "prompts": len(self.prompts)}


def load_prompt_set(config: PromptSetConfig) -> PromptSet:
    """The prompt set that the config describes: the built-in one, or a Parquet, CSV or JSONL file.

    Columns `prompt_tokens` and `output_tokens` are used where the file has them, as in the custom
    JSONL of `vllm bench serve`, unless other names are given. In `quality_columns` a name and a column
    may hold one `*`: {"*": "score__*"} takes every column that matches, under what the star stands for.
    Raises DataError for a file that is missing, of the wrong type, empty or without a column asked for.
    """
    if config.limit is not None and config.limit < 1:
        raise bad_value(f"{KEY}.limit", ">= 1", config.limit)
    if config.path is None:
        return PromptSet("built-in", _built_in()[: config.limit])
    table = read_table(config.path, f"{KEY}.path")
    if config.limit is not None:
        table = table.iloc[: config.limit]
    return PromptSet(Path(config.path).name, _prompts(table, config, config.path))


def _built_in() -> list[Prompt]:
    folder = resources.files("ersim.workload").joinpath("data/prompts")
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".jsonl")), key=lambda f: f.name)
    prompts = []
    for file in files:
        domain = file.name.removesuffix(".jsonl")
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            prompts.append(Prompt(f"{domain}-{number:03d}", json.loads(line)["prompt"], domain))
    return prompts


def _prompts(table: pd.DataFrame, config: PromptSetConfig, path: str) -> list[Prompt]:
    rows = len(table)
    text = texts(require_column(table, config.text_column, path, f"{KEY}.text_column"), path)
    domain = _domains(table, config, path)
    if config.id_column is None:
        ids = [str(row) for row in range(rows)]
    else:
        ids = [str(value) for value in require_column(table, config.id_column, path, f"{KEY}.id_column")]
    prompt_tokens = _tokens(table, config.prompt_tokens_column, "prompt_tokens", path)
    output_tokens = _tokens(table, config.output_tokens_column, "output_tokens", path)
    quality = _quality(table, config.quality_columns, path)
    return [
        Prompt(*row) for row in zip(ids, text, domain, prompt_tokens, output_tokens, quality, strict=True)
    ]


def _domains(table: pd.DataFrame, config: PromptSetConfig, path: str) -> Sequence[str]:
    if config.domain_column is None:
        return [NO_DOMAIN] * len(table)
    key = f"{KEY}.domain_column; null means that the set has no domains"
    values = require_column(table, config.domain_column, path, key)
    return [str(value) if known else NO_DOMAIN for value, known in zip(values, values.notna(), strict=True)]


def _tokens(table: pd.DataFrame, column: str | None, usual: str, path: str) -> list[int | None]:
    """Token counts by row, None where the set has none."""
    if column is None and usual not in table.columns:
        return [None] * len(table)
    values = require_column(table, column or usual, path, f"{KEY}.{usual}_column")
    known = values.notna()
    counts: list[int | None] = [None] * len(table)
    for row, count in zip(np.flatnonzero(known), whole_numbers(values[known], path, 1), strict=True):
        counts[row] = int(count)
    return counts


def _quality(table: pd.DataFrame, columns: dict[str, str], path: str) -> list[dict[str, float]]:
    scores: list[dict[str, float]] = [{} for _ in range(len(table))]
    for model, column in _expand_star(table, columns, path).items():
        values = require_column(table, column, path, f"{KEY}.quality_columns.{model}")
        known = values.notna()
        for row, score in zip(np.flatnonzero(known), real_numbers(values[known], path, 0, 1), strict=True):
            scores[row][model] = float(score)
    return scores


def _expand_star(table: pd.DataFrame, columns: dict[str, str], path: str) -> dict[str, str]:
    named = {model: column for model, column in columns.items() if "*" not in column}
    for model, pattern in columns.items():
        if "*" not in pattern:
            continue
        head, _, tail = pattern.partition("*")
        matching = [str(name) for name in table.columns if fnmatchcase(str(name), pattern)]
        if not matching:
            require_column(table, pattern, path, f"{KEY}.quality_columns.{model}")
        for name in matching:
            named.setdefault(model.replace("*", name[len(head) : len(name) - len(tail)]), name)
    return named
