"""What a vLLM server's log says about its end: the exception that began it, and what a user can do.

vLLM prints one failure several times, first where it happened and then in every process above, each
with its traceback; what was wrong is the first exception, often hundreds of lines before the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TAIL_LINES = 25
CAUSE_LINES = 3

_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ERROR \S+ \S+ \[[^\]]*\] ?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b(?::|$)")

REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"(?i)_C::\w*fp8|find a kernel .*\bCPUFp8",
        "vLLM has no fp8 kernel for this machine (its CPU build needs AMX and live.quantization=fp8-block): "
        "take {key}.precision=int8, int4 or bf16, or a GPU that has fp8",
    ),
    (
        r"find a kernel",
        "vLLM has no kernel on this machine for weights quantized like that: take another {key}.precision, "
        "or another {key}.live.quantization of the same",
    ),
    (
        r"less than requested memory for kv",
        "the KV cache does not fit into the memory that is free: lower {key}.live.kv_space_gib",
    ),
    (
        r"larger than the available KV cache memory",
        "one request of max_model_len tokens does not fit into the KV cache: raise {key}.live.kv_space_gib "
        "(on a GPU {key}.engine.gpu_memory_utilization), or lower {key}.engine.max_model_len",
    ),
    (
        r"couldn't connect to '\S+' to load the files",
        "{key}.live.model names a model of the hub, which does not answer, and it is not in the local cache: "
        "give the directory of a model",
    ),
)
"""Causes (regular expressions) that a user can do something about, and what; {key} is the expert's key."""


def tail(log: str) -> str:
    """The last lines, fit for an error message."""
    return "\n".join(log.splitlines()[-TAIL_LINES:])


def exceptions(log: str) -> Iterator[str]:
    """Every exception that the log names, each with the lines that continue it, in order."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        prefix, text = _parted(line)
        if _EXCEPTION.match(text):
            parts = [text]
            for following in lines[number + 1 : number + CAUSE_LINES]:
                its_prefix, more = _parted(following)
                if its_prefix != prefix or not (prefix or more.startswith("  ")):
                    break
                parts.append(more)
            yield " ".join(part.strip() for part in parts)


def root_cause(log: str) -> str | None:
    """The first exception in the log; None if there is none."""
    return next(exceptions(log), None)


def _parted(line: str) -> tuple[str, str]:
    """What vLLM puts before each line of an error, and the line; the former is empty for other lines."""
    found = _PREFIX.match(line)
    return (found.group(), line[found.end() :]) if found else ("", line)


def explanation(log: str, key: str) -> str | None:
    """Cause and remedy of a failure that is known, in one sentence; None for any other."""
    for cause in exceptions(log):
        for pattern, remedy in REMEDIES:
            if re.search(pattern, cause):
                return f"{remedy.format(key=key)} (vLLM: {cause})"
    return None
