"""An expert named by a hub id: its weights come from the hub's own cache, as after a first download."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from ersim.config import EngineSettings, ExpertConfig, FleetConfig

pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
pytestmark = pytest.mark.live

HUB_ID = "acme/tiny"
REVISION = "1".rjust(40, "0")


def test_a_hub_id_serves_the_weights_of_the_hubs_cache(tmp_path: Path) -> None:
    from checkpoints import MAX_MODEL_LEN, sure_answers, write_checkpoint

    from testbed.fleet import LiveFleet

    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    model = write_checkpoint(snapshot, "bf16", 0)
    answers = sure_answers(model, asked=256, kept=4, prompt_tokens=12, answer_tokens=8)
    live = {
        "model": HUB_ID, "tokenizer": "none", "cores": [[0]], "kv_space_gib": 0.25,
        "env": {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    }  # fmt: skip
    expert = ExpertConfig(
        "llama-36m", "bf16", "cpu", engine=EngineSettings(max_model_len=MAX_MODEL_LEN), live=live
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with LiveFleet(FleetConfig("hub", experts={"a": expert}), tmp_path / "fleet", print) as fleet:
        for prompt, expected, _ in answers:
            body = {
                "model": "a", "prompt": prompt, "max_tokens": len(expected), "temperature": 0.0,
                "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            request = urllib.request.Request(
                f"{fleet.urls()['a'][0]}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with direct.open(request, timeout=120) as answer:
                assert json.load(answer)["choices"][0]["token_ids"] == expected
