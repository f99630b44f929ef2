"""The gateway's settings file: whatever is wrong with it is one message, and what is right passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ersim.errors import ConfigError, DataError
from testbed.gateway.__main__ import main
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings, check, read_settings, to_dict

EXPERT = {"name": "a", "urls": ["http://127.0.0.1:9"]}
GOOD = {"experts": [EXPERT], "policy_path": "p"}
SECONDS = "must be a number of seconds > 0 and <= 1e+06, got "
TEXT = "must be a non-empty string of printable characters without spaces at its ends"


def expert(**changes: Any) -> dict[str, Any]:
    return {"experts": [{**EXPERT, **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (expert(name=1), f"gateway.experts[0].name {TEXT}, and not auto, which is the router, got 1"),
        (expert(name="auto"), "and not auto, which is the router, got 'auto'"),
        (expert(name="a\nb"), "gateway.experts[0].name must be"),
        (expert(urls="http://127.0.0.1:9"), "experts[0].urls must be a list of one or more base URLs"),
        (expert(urls={"http://127.0.0.1:9": 1}), "gateway.experts[0].urls must be a list of one or more"),
        (expert(urls=[]), "gateway.experts[0].urls must be a list of one or more"),
        (expert(urls=[5]), "experts[0].urls[0] must be a base URL such as http://127.0.0.1:8000, got 5"),
        (expert(urls=["127.0.0.1:9"]), "urls[0] must be a base URL such as"),
        (expert(urls=["http://h:99999"]), "urls[0] must be a base URL such as"),
        (expert(urls=["http://a..b"]), "urls[0] must be a base URL such as"),
        (expert(urls=[f"http://{'a' * 64}.b"]), "urls[0] must be a base URL such as"),
        (expert(urls=["http://h/?q=1"]), "urls[0] must be a base URL such as"),
        (expert(slots=1.5), "gateway.experts[0].slots must be an integer >= 1, got 1.5"),
        (expert(slots=True), "gateway.experts[0].slots must be an integer >= 1, got True"),
        (expert(slots=0), "gateway.experts[0].slots must be an integer >= 1, got 0"),
        (expert(domains=5), "gateway.experts[0].domains must be a list, got 5"),
        (expert(domains=[5]), f"gateway.experts[0].domains[0] {TEXT}, got 5"),
        (expert(model=5), "gateway.experts[0].model must be a string of printable characters, got 5"),
        (expert(upstream_model=""), f"gateway.experts[0].upstream_model {TEXT} or null, got ''"),
        (expert(usd_per_mtok_in="1"), "usd_per_mtok_in must be a number >= 0 or null, got '1'"),
        (expert(x=1), "a key of gateway.experts[0] must be one of: domains,"),
        ({"experts": [{"name": "a"}]}, "gateway.experts[0].urls is missing; it has no default"),
        ({"experts": ["a"]}, "gateway.experts[0] must be an object, got 'a'"),
        ({"experts": []}, "gateway.experts must be a list of one or more experts, got []"),
        ({"experts": EXPERT}, "gateway.experts must be a list of one or more experts, got {"),
        ({"experts": [EXPERT, EXPERT]}, "gateway.experts must be experts of different names"),
        ({"policy_path": 5}, f"gateway.policy_path {TEXT}, got 5"),
        ({"policy_path": "a\0b"}, f"gateway.policy_path {TEXT}, got 'a\\x00b'"),
        ({"port": 1.5}, "gateway.port must be an integer from 1 to 65535, got 1.5"),
        ({"port": 99999}, "gateway.port must be an integer from 1 to 65535, got 99999"),
        ({"port": None}, "gateway.port must be an integer from 1 to 65535, got null"),
        ({"host": 5}, f"gateway.host {TEXT}, got 5"),
        ({"host": "0.0.0.0"}, "host must be a loopback address unless api_keys are set, got '0.0.0.0'"),
        ({"balancer": "best"}, "gateway.balancer must be one of: least_kv, least_outstanding, random"),
        ({"seed": "x"}, "gateway.seed must be an integer >= 0, got 'x'"),
        ({"seed": -1}, "gateway.seed must be an integer >= 0, got -1"),
        ({"api_keys": None}, "gateway.api_keys must be a list of keys, each a non-empty string"),
        ({"api_keys": 5}, "gateway.api_keys must be a list of keys, each a non-empty string"),
        ({"api_keys": [1]}, f"gateway.api_keys[0] {TEXT}, got a value of type int, not shown here"),
        ({"api_keys": [""]}, f"gateway.api_keys[0] {TEXT}"),
        ({"api_keys": ["\ud800"]}, f"gateway.api_keys[0] {TEXT}"),
        ({"queue_limit": -1}, "gateway.queue_limit must be an integer >= 0, got -1"),
        ({"queue_timeout_s": float("nan")}, f"gateway.queue_timeout_s {SECONDS}nan"),
        ({"idle_timeout_s": 1e300}, f"gateway.idle_timeout_s {SECONDS}1e+300"),
        ({"idle_timeout_s": 10**400}, f"gateway.idle_timeout_s {SECONDS}1000"),
        ({"health_period_s": 0}, f"gateway.health_period_s {SECONDS}0"),
        ({"retry_after_s": "soon"}, "gateway.retry_after_s must be an integer >= 0, got 'soon'"),
        ({"retry_after_s": -5}, "gateway.retry_after_s must be an integer >= 0, got -5"),
        ({"attempts": 1.5}, "gateway.attempts must be an integer >= 1, got 1.5"),
        ({"attempts": "3"}, "gateway.attempts must be an integer >= 1, got '3'"),
        ({"attempts": 0}, "gateway.attempts must be an integer >= 1, got 0"),
        ({"failover": "no"}, "gateway.failover must be true or false, got 'no'"),
        ({"failover": 1}, "gateway.failover must be true or false, got 1"),
        ({"access_log": 5}, f"gateway.access_log {TEXT} or null, got 5"),
        ({"prot": 1}, "a key of gateway must be one of: access_log,"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_remedy(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a whole JSON document"),
        (b'{"experts": "\xff"}', "not a JSON document that can be read ('utf-8' codec"),
        (b"[" * 100_000, "not a JSON document that can be read (maximum recursion depth"),
        (b"[" + b"1" * 10_000 + b"]", "not a JSON document that can be read"),
        (b"[]", "gateway must be an object, got []"),
        (b"{}", "gateway.experts is missing; it has no default"),
        (b'{"experts": [{"name": "a", "urls": ["u"]}]}', "gateway.policy_path is missing; it has no default"),
    ],
)
def test_a_file_that_is_no_settings_is_one_line_on_stderr(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "gateway.json"
    path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["gateway", str(path)])
    assert main() == 2
    said = capsys.readouterr().err
    assert message in said and str(path) in said and said.count("\n") == 1


def test_a_folder_or_no_file_at_all_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(DataError, match="cannot be read"):
            read_settings(path)


def test_keys_are_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        check(GatewaySettings([ExpertEndpoint("a", ["http://h"])], "p", api_keys="secret"))  # type: ignore[arg-type]
    assert "gateway.api_keys must be a list of keys" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_settings_survive_the_file(tmp_path: Path) -> None:
    settings = GatewaySettings(
        [ExpertEndpoint("a", ["http://127.0.0.1:9", "https://[::1]:8/base"], "m", ["x"], 7, "u", 0.5, 1.0)],
        "p", "0.0.0.0", 1, "least_kv", 3, ["k"], 0, 1.0, 0, 1, False, 1.5, 2.0, 3.0, 4.0, 5.0, 6, "log",
    )  # fmt: skip
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps(to_dict(settings)))
    assert read_settings(path) == settings
    path.write_text(json.dumps({**GOOD, "queue_timeout_s": 5, "access_log": None}))
    assert read_settings(path).queue_timeout_s == 5.0
    assert dataclasses.replace(settings, host="::1").url == "http://[::1]:1"
