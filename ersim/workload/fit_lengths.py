"""Fit the length tables of `data/lengths.json` to request traces, and the published ones to figures.

    python -m ersim.workload.fit_lengths CONVERSATION.csv CODE.csv > lengths.json

The traces are the Azure LLM inference trace 2023 (CC-BY 4.0, github.com/Azure/AzurePublicDataset,
published with Patel et al., "Splitwise", ISCA 2024) with columns arrived_at, num_prefill_tokens,
num_decode_tokens.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from ersim.errors import DataError
from ersim.workload.traces import read_trace

PROMPT_LEVELS = np.concatenate([[0, 0.001, 0.003], np.linspace(0.01, 0.99, 99), [0.997, 0.999, 1]])
OUTPUT_LEVELS = np.concatenate([[0, 0.01], np.linspace(0.04, 0.96, 24), [0.985, 0.995, 1]])
PROMPT_CLASSES = 20

AZURE = (
    "Azure LLM inference trace 2023, {service} service (CC-BY 4.0, Azure Public Dataset; Patel et al., "
    "Splitwise, ISCA 2024), {rows} requests"
)

TOKENS_PER_WORD = 4 / 3
CNN_DAILYMAIL_CV = 0.5
CNN_DAILYMAIL = (
    "CNN/DailyMail news summarisation: means of 781 words an article and 56 a summary (See et al., Get To "
    "The Point, ACL 2017), articles up to 2,000 words (dataset card); 4/3 tokens a word (OpenAI's rule of "
    "thumb). No spread is published there: log-normal with coefficient of variation 0.5, prompt and answer "
    "independent, are assumptions"
)


@dataclass(frozen=True)
class Shape:
    """A log-normal length by its mean and coefficient of variation, cut to [low, high]; all in tokens."""

    mean: float
    cv: float
    low: float
    high: float

    def quantiles(self, levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        variance = np.log1p(self.cv**2)
        median = self.mean * np.exp(-variance / 2)
        tokens: npt.NDArray[np.float64] = np.clip(
            median * np.exp(np.sqrt(variance) * norm.ppf(levels)), self.low, self.high
        )
        return tokens


def fit_table(
    prompt_tokens: npt.NDArray[Any], output_tokens: npt.NDArray[Any], source: str
) -> dict[str, Any]:
    """Quantile table of two token counts of shape (n,); the classes hold equal shares of the requests.

    Ties in the prompt length are broken by a fixed shuffle, so that a spike (one length that thousands of
    requests share) is spread over its classes without order effects.
    """
    order = np.lexsort((np.random.default_rng(0).random(len(prompt_tokens)), prompt_tokens))
    outputs = [
        np.quantile(rows, OUTPUT_LEVELS) for rows in np.array_split(output_tokens[order], PROMPT_CLASSES)
    ]
    return _entry(source, np.quantile(prompt_tokens, PROMPT_LEVELS), np.array(outputs))


def lognormal_table(source: str, prompt: Shape, output: Shape) -> dict[str, Any]:
    """Quantile table of independent log-normal lengths."""
    return _entry(source, prompt.quantiles(PROMPT_LEVELS), output.quantiles(OUTPUT_LEVELS)[None, :])


def _entry(source: str, prompts: npt.NDArray[Any], outputs: npt.NDArray[Any]) -> dict[str, Any]:
    return {
        "source": source,
        "prompt_levels": np.round(PROMPT_LEVELS, 4).tolist(),
        "prompt_tokens": np.round(prompts).astype(int).tolist(),
        "output_levels": np.round(OUTPUT_LEVELS, 4).tolist(),
        "output_tokens": np.round(outputs).astype(int).tolist(),
    }


def summarisation() -> dict[str, Any]:
    """News summarisation after the published means of CNN/DailyMail."""
    prompt = Shape(781 * TOKENS_PER_WORD, CNN_DAILYMAIL_CV, 60 * TOKENS_PER_WORD, 2000 * TOKENS_PER_WORD)
    output = Shape(56 * TOKENS_PER_WORD, CNN_DAILYMAIL_CV, 10 * TOKENS_PER_WORD, 300 * TOKENS_PER_WORD)
    return lognormal_table(CNN_DAILYMAIL, prompt, output)


def main(conversation: Path, code: Path) -> dict[str, Any]:
    """All tables by kind."""
    tables: dict[str, Any] = {}
    for kind, path in (("conversation", conversation), ("code", code)):
        trace = read_trace(path)
        source = AZURE.format(service=kind, rows=len(trace))
        if trace.prompt_tokens is None:
            raise DataError(f"{path} has texts but no prompt lengths to fit")
        tables[kind] = fit_table(trace.prompt_tokens, trace.output_tokens, source)
    tables["summarisation"] = summarisation()
    return tables


def render(tables: dict[str, Any]) -> str:
    """JSON with one array a line, so that a change to a table reads as one."""
    text = json.dumps(tables, indent=1)
    return re.sub(r"\[[-\d.,\s]+\]", lambda array: "[" + " ".join(array[0][1:-1].split()) + "]", text)


if __name__ == "__main__":
    print(render(main(Path(sys.argv[1]), Path(sys.argv[2]))))
