"""The share of KV blocks that `least_kv` goes by, as real vLLM tells it."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from testbed.gateway.kv_share import kv_share

pytestmark = pytest.mark.live


def test_vllm_still_calls_it_so() -> None:
    found = find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("needs the real vLLM: make test-live")
    source = (Path(found.origin).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    assert '"vllm:kv_cache_usage_perc"' in source


def test_a_running_expert_tells_its_share(live: Any) -> None:
    url = live.fleet.urls()["large"][0]

    async def shares() -> tuple[float | None, float | None]:
        """While a request runs, and long after."""
        body = {"model": "large", "prompt": [5] * 500, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession(headers={"Accept-Encoding": "identity"}) as session:

            async def share() -> float | None:
                async with session.get(url + "/metrics", allow_redirects=False) as answer:
                    assert answer.status == 200
                    return kv_share(await answer.read())

            async with session.post(url + "/v1/completions", json=body) as answer:
                await answer.content.readany()
                await asyncio.sleep(0.2)
                busy = await share()
                await answer.read()
            await asyncio.sleep(1.0)
            return busy, await share()

    busy, idle = asyncio.run(shares())
    assert busy is not None and idle is not None and 0.0 <= idle < busy <= 1.0
