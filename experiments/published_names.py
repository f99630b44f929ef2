"""What published runs call GPUs, models, precisions, releases and engine settings, in our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ersim.config import EngineSettings
from ersim.errors import DataError

GPU_PATTERNS: tuple[tuple[str, str | None], ...] = (  # first match wins
    (r"gh200|gb[23]00|mi\d|gaudi|tpu", None),  # contain names of GPUs that they are not
    (r"h200", "h200-141gb"),
    (r"h100.*nvl", "h100-nvl"),
    (r"h100.*pcie", "h100-pcie"),
    (r"h100", "h100-80gb"),
    (r"b200", "b200"),
    (r"a100.*40", "a100-40gb"),
    (r"a100", "a100-80gb"),
    (r"3090", "rtx3090"),
    (r"4090", "rtx4090"),
    (r"5090", "rtx5090"),
    (r"pro[ _-]*6000", "rtxpro6000"),
    (r"6000[ _-]*ada", "rtx6000ada"),
    (r"a6000", "rtxa6000"),
    (r"l40s", "l40s"),
    (r"l40\b", "l40"),
    (r"a10g", "a10g"),
    (r"a10\b", "a10"),
    (r"a40\b", "a40"),
    (r"\bl4\b", "l4"),
)
MODEL_PATTERNS: tuple[tuple[str, Mapping[str, str], str], ...] = (
    (r"llama[-_ ]?3(?:\.\d)?[-_ ](1|3|8|70|405)b", {"1": "llama3.2-1b", "3": "llama3.2-3b"}, "llama3.1-{}b"),
    (r"llama[-_ ]?2[-_ ](7|13|70)b", {}, "llama2-{}b"),
    (r"codellama[-_ ](34)b", {}, "codellama-{}b"),
    (r"qwen[-_ ]?2(?:\.5)?[-_ ](7|14|32|72)b", {}, "qwen2.5-{}b"),
    (r"qwen[-_ ]?3[-_ ](8|14|32)b", {}, "qwen3-{}b"),
    (r"mistral[-_ ](7)b", {}, "mistral-{}b"),
)
ASYNC_SINCE = (0, 14)  # vLLM releases from this one schedule asynchronously by default
FULL_ISL_SINCE = (0, 17)  # and from this one admit a request only if its whole prompt fits
GRAPHS_PROFILED_SINCE = (0, 21)
V1_SINCE = (0, 8)  # releases before this one ran the old engine: no prefix cache by default
ENGINE_ALIASES: Mapping[str, str] = {
    "num_gpu_blocks": "kv_blocks",
    "num_gpu_blocks_override": "kv_blocks",
    "gpu_kv_blocks_16tok": "kv_blocks",
    "gpu_kv_blocks": "kv_blocks",
    "gpu_mem_util": "gpu_memory_utilization",
    "gpu_memory_util": "gpu_memory_utilization",
    "max_seq_len": "max_model_len",
    "chunked_prefill": "enable_chunked_prefill",
    "prefix_caching": "enable_prefix_caching",
    "enable_prefix_cache": "enable_prefix_caching",
    "scheduling_policy": "policy",
    "kv_cache_precision": "kv_cache_dtype",
}
COUNTS = (
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "kv_blocks"),
    "long_prefill_token_threshold",
)
STRINGS = ("policy", "kv_cache_dtype")
SHARES = ("gpu_memory_utilization", "watermark")
FLAGS = (
    *("enable_chunked_prefill", "enable_prefix_caching", "scheduler_reserve_full_isl"),
    "async_scheduling",
)
# Settings that change what a step is; a run that used them is not predicted rather than predicted wrongly.
REFUSED = ("pipeline_parallel_size", "data_parallel_size", "num_speculative_tokens", "speculative_config")
UNMODELLED_PRECISIONS = re.compile(r"fp4|fp6|w4a4|gguf|nf4|bitsandbytes|\b[23]-?bit|int[23]\b|ternary")
UNMODELLED = ("enforce_eager", "cpu_kv_offload", "cpu_offload_gb", "enable_lora")  # said, then ignored


def gpu_name(text: str, where: str) -> str:
    """The name in conf/gpu that a GPU's marketing name means."""
    for pattern, name in GPU_PATTERNS:
        if re.search(pattern, text.lower()):
            if name is None:
                break
            return name
    raise DataError(f"{where}: gpu {text!r} is not known; describe it in conf/gpu and name it there")


def model_name(text: str, where: str) -> str:
    """The name in conf/model that a checkpoint's name means (Llama 3, 3.1 and 3.3 share their shapes)."""
    for pattern, special, name in MODEL_PATTERNS:
        match = re.search(pattern, text.lower())
        if match is not None:
            return special.get(match.group(1), name.format(match.group(1)))
    raise DataError(
        f"{where}: model {text!r} is not known; dense models of conf/model are (Llama 2 and 3, Qwen 2.5 "
        "and 3, Mistral 7B): describe it there"
    )


def precision_name(text: str, where: str = "run.yaml") -> str:
    """bf16, fp8, int8 or int4 from however the run writes it; nothing recognised is bf16.

    Raises DataError for formats that are known and not modelled.
    """
    lowered = text.lower()
    unknown = UNMODELLED_PRECISIONS.search(lowered)
    if unknown is not None:
        raise DataError(f"{where}: precision {text!r} is not modelled (bf16, fp8, int8 and int4 are)")
    for marks, name in (
        (("fp8",), "fp8"),
        (("w8a8", "w8a16", "int8"), "int8"),
        (("awq", "gptq", "int4", "w4a16", "w4a8", "4bit", "4-bit"), "int4"),
    ):
        if any(mark in lowered for mark in marks):
            return name
    return "bf16"


def version(text: object) -> tuple[int, ...] | None:
    """(0, 15, 1) of "v0.15.1"; None when unrecorded. YAML reads 0.10 as the number 0.1: taken as 0.10."""
    if isinstance(text, float) and 0 < text < 0.6:
        text = f"{text}0"
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", str(text))
    return tuple(int(part) for part in match.groups() if part) if match else None


def is_recorded(value: object) -> bool:
    """Whether a field holds anything: not None, NaN, or words like "unrecorded" and "per row"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    words = ("", "unrecorded", "unknown", "default", "defaults", "per row", "n/a", "none", "nan")
    return not (isinstance(value, str) and value.strip().lower() in words)


def engine_fields(engine: object) -> dict[str, Any]:
    """Engine settings as a mapping: run.yaml's own, or read from vLLM's command line (text or a list).

    A flag without a value is on, --no-enable-x is off. What cannot be read is left out.
    """
    if isinstance(engine, dict):
        return {str(key): value for key, value in engine.items()}
    if isinstance(engine, (list, tuple)):
        engine = " ".join(str(part) for part in engine)
    found: dict[str, Any] = {}
    for name, value in re.findall(r"--([a-z][\w-]*)(?:[ =]+((?!--)\S+))?", str(engine or "")):
        key = name.replace("-", "_")
        off = key.startswith("no_enable_") and not value
        found[key.removeprefix("no_") if off else key] = value or (not off)
    return found


def _flag(value: object) -> bool:
    return str(value).strip().lower() in ("true", "1", "1.0", "yes", "on")


def _one_setting(name: str, value: object, where: str) -> Any:
    """A recorded engine setting in the type that `EngineSettings` wants."""
    if name == "policy":
        return str(value).lower()
    if name == "kv_cache_dtype":
        return "fp8" if "fp8" in str(value).lower() else "auto"
    if name in FLAGS:
        return _flag(value)
    try:
        number = float(str(value).replace(",", "").replace("_", ""))
    except ValueError as error:
        raise DataError(f"{where}: engine.{name} must be a number, got {value!r}") from error
    return int(number) if name in COUNTS else number


def engine_settings(
    recorded: Mapping[str, Any], release: tuple[int, ...] | None, where: str = "run.yaml"
) -> dict[str, Any]:
    """Recorded engine settings under `EngineSettings`' names, and defaults that the release changed.

    Raises DataError for settings that are not modelled and would make the prediction wrong.
    """
    settings: dict[str, Any] = {}
    for key, value in recorded.items():
        name = ENGINE_ALIASES.get(key, key)
        if not is_recorded(value):
            continue
        if name in REFUSED and str(value).lower() not in ("0", "1", "1.0", "false"):
            raise DataError(f"{where}: {key}={value} is not modelled; leave this run out")
        if name in EngineSettings.__dataclass_fields__ and name in (*COUNTS, *SHARES, *FLAGS, *STRINGS):
            settings[name] = _one_setting(name, value, where)
    if release is not None:
        settings.setdefault("async_scheduling", release >= ASYNC_SINCE)
        settings.setdefault("scheduler_reserve_full_isl", release >= FULL_ISL_SINCE)
        settings.setdefault("gpu_memory_utilization", 0.9 if release < GRAPHS_PROFILED_SINCE else 0.92)
        if release < V1_SINCE:
            settings.setdefault("enable_prefix_caching", False)
    return settings


def unmodelled(recorded: Mapping[str, Any]) -> str:
    """What the run had switched on that has no part in the model, as words; empty when nothing."""
    found = [name for name in UNMODELLED if is_recorded(recorded.get(name)) and _is_on(recorded[name])]
    return f"not modelled, ignored: {', '.join(found)}" if found else ""


def _is_on(value: object) -> bool:
    return str(value).strip().lower() not in ("0", "0.0", "false", "no", "off")
