"""Real weights: what an expert answers is what transformers makes of the same checkpoint.

One fleet, started as users start one: an expert on a checkpoint folder of each precision, the bf16 one
spread over two tensor-parallel ranks.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ersim.config import EngineSettings, ExpertConfig, FleetConfig

pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
pytestmark = pytest.mark.live

EXPERTS = {"bf16": ("bf16", 2), "int8": ("int8", 1), "gptq": ("int4", 1), "awq": ("int4", 1)}
"""By the method that packed the checkpoint: the expert's precision and its tensor-parallel ranks."""
KV_SPACE_GIB = 0.25
READY_TIMEOUT_S = 600.0  # twelve processes start at once
SURE_LEAD = 0.2  # of a logit; computing in bfloat16 moves those of these models by 0.02 (root mean square)


@dataclass(frozen=True)
class Served:
    """The running fleet, and what the checkpoint of each expert answers in transformers."""

    urls: dict[str, str]
    answers: dict[str, list[tuple[list[int], list[int], float]]]
    folder: Path


def has_amx() -> bool:
    """Whether this CPU has AMX, as torch tells."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


@pytest.fixture(scope="module")
def fp8_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server of an fp8 expert, started and not waited for: the others start meanwhile.

    In blocks where the CPU has AMX, which vLLM has a kernel for.
    """
    from testbed.expert_server import ExpertServer
    from testbed.fleet import server_specs

    live = {"kv_space_gib": KV_SPACE_GIB, "ready_timeout_s": READY_TIMEOUT_S}
    if has_amx():
        live["quantization"] = "fp8-block"
    expert = ExpertConfig("llama-36m", "fp8", "cpu", live=live)
    specs = server_specs(FleetConfig("fp8", experts={"a": expert}), tmp_path_factory.mktemp("fp8"))
    server = ExpertServer(specs["a"][0])
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, fp8_server: Any) -> Iterator[Served]:
    """All checkpoints, served; afterwards every process of every server must be gone."""
    from checkpoints import MAX_MODEL_LEN, sure_answers, write_checkpoint

    from testbed.expert_server import _descendants
    from testbed.fleet import LiveFleet

    folder = tmp_path_factory.mktemp("checkpoints")
    answers, experts = {}, {}
    for seed, (name, (precision, tp)) in enumerate(EXPERTS.items()):
        model = write_checkpoint(folder / name, name, seed)
        answers[name] = sure_answers(model, asked=256, kept=4, prompt_tokens=12, answer_tokens=8)
        cores = [0, 1] if tp == 2 else [seed % 2]
        live = {
            "model": str(folder / name),
            "tokenizer": "model",
            "cores": [cores],
            "kv_space_gib": KV_SPACE_GIB,
            "ready_timeout_s": READY_TIMEOUT_S,
        }
        engine = EngineSettings(max_model_len=MAX_MODEL_LEN)
        experts[name] = ExpertConfig("llama-36m", precision, "cpu", tp, engine=engine, live=live)
    with LiveFleet(FleetConfig("checkpoints", experts=experts), folder / "servers", print) as fleet:
        urls = {name: group[0] for name, group in fleet.urls().items()}
        yield Served(urls, answers, folder / "servers")
        started = set(_descendants(os.getpid())) - {fp8_server._process.pid}
        started -= set(_descendants(fp8_server._process.pid))
    assert len(started) > 2 * len(EXPERTS), "front ends, engines and ranks"
    assert not [pid for pid in started if serves(pid)]


def serves(pid: int) -> bool:
    """Whether a process of a server is still there (and its number not somebody else's)."""
    try:
        return b"vllm" in Path(f"/proc/{pid}/cmdline").read_bytes().lower()
    except OSError:
        return False


def complete(url: str, body: dict[str, Any]) -> Any:
    """The first choice of POST /v1/completions, greedy."""
    body = {"model": "auto", "temperature": 0.0, "ignore_eos": True, "return_token_ids": True, **body}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(f"{url}/v1/completions", data, headers), timeout=120) as answer:
        return json.load(answer)["choices"][0]


@pytest.mark.parametrize("name", list(EXPERTS))
def test_an_expert_answers_with_the_weights_of_its_checkpoint(served: Served, name: str) -> None:
    assert len(served.answers[name]) == 4
    for prompt, expected, lead in served.answers[name]:
        assert lead > SURE_LEAD
        asked = {"prompt": prompt, "max_tokens": len(expected)}
        assert complete(served.urls[name], asked)["token_ids"] == expected


def test_text_goes_through_the_tokenizer_of_the_checkpoint(served: Served) -> None:
    from testbed.weightless import SPECIAL_WORDS, word

    prompt, expected, _ = served.answers["awq"][0]
    asked = {"prompt": " ".join(map(word, prompt)), "max_tokens": len(expected)}
    choice = complete(served.urls["awq"], asked)
    assert choice["token_ids"] == expected
    assert choice["text"].split() == [word(token) for token in expected if token >= len(SPECIAL_WORDS)]


def test_ranks_share_one_engine_whose_steps_are_recorded(served: Served) -> None:
    from testbed.replay import replay
    from testbed.step_log import read_step_log

    prompt, expected, _ = served.answers["bf16"][0]
    complete(served.urls["bf16"], {"prompt": prompt, "max_tokens": len(expected)})
    time.sleep(1.0)  # the recorder writes twice a second
    log = read_step_log(served.folder / "bf16.steps.jsonl")
    assert len(log.steps) >= len(expected) and (log.periods_s() > 0).all()
    assert replay(log).share == 1.0
    per_token = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, their size, bytes; half of it a rank
    blocks = KV_SPACE_GIB * 2**30 / (log.meta["block_size"] * per_token / 2)
    assert log.meta["num_blocks"] == int(blocks)


def test_a_precision_that_the_build_cannot_serve_is_one_message(fp8_server: Any) -> None:
    from testbed.expert_server import ExpertFailed

    if has_amx():
        pytest.skip("on a CPU with AMX vLLM has some fp8 kernels")
    remedy = r"no fp8 kernel for this machine.*take fleet\.experts\.a\.precision=int8, int4 or bf16"
    with pytest.raises(ExpertFailed, match=remedy) as raised:
        fp8_server.wait_ready()
    assert len(str(raised.value).splitlines()) == 1


def test_fp8_is_served_where_the_machine_has_a_kernel(fp8_server: Any) -> None:
    from testbed.replay import replay
    from testbed.step_log import read_step_log

    if not has_amx():
        pytest.skip("without AMX vLLM's CPU build has no fp8 kernel")
    fp8_server.wait_ready()
    body = {"model": "a", "prompt": list(range(3, 40)), "max_tokens": 8}
    assert len(complete(fp8_server.spec.url, body)["token_ids"]) == 8
    time.sleep(1.0)  # the recorder writes twice a second
    log = read_step_log(fp8_server.spec.steps_path)
    assert log.meta["quantization"] == "fp8" and len(log.steps) == 8
    assert replay(log).share == 1.0
