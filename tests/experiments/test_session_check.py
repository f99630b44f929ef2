"""`make live` and the GPU session: nothing is measured for a command that would be refused later."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from ersim.errors import ConfigError
from experiments import gpu_session, live
from experiments.gpu_session import EXPERTS, commands
from experiments.session_check import check_first

GPU = ["expert=llama3_8b_bf16", "expert.gpu=h200-141gb", "live_plan=gpu", "users=1,4"]


def both(*arguments: str) -> tuple[list[str], list[str]]:
    return live.split_arguments([*GPU, *arguments])


def test_what_we_ship_can_begin() -> None:
    before = HydraConfig.instance().cfg  # an earlier test's command may have left its own
    check_first(*live.split_arguments(["fleet=live_cpu"]))
    for expert in EXPERTS:
        profile, validation = commands(expert, "h200-141gb", "1,10,100,500,1000", [])
        check_first(profile[3:], validation[3:])
    check_first(*both())
    check_first(*both("~fleet"))
    assert HydraConfig.instance().cfg is before, "what comes after is not told of it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["users=1,50"], r"^users must be loads that do not calibrate .*\[2, 50, 200\]\), got \[50\]"),
        (["users=1,2", "plan.mixed_users=[2]"], r"users must be loads .*got \[2\]"),
        (["users=1,x"], r"^Error merging override users=\[1,x\]: .*'x'"),
        (["users="], "^users must be one or more loads"),
        (["expert=foo"], "^In 'live/profile': Could not find 'expert/foo' Available options .*_fp8"),
        (["expert.gpu=h200"], r"^fleet\.experts\.llama3_8b_bf16\.gpu must be one of: a10, "),
        (["+expert.live.api_servers=x"], r"live\.api_servers must be an integer >= 1, got 'x'"),
        (["plan.prefill_tokens=[9000]"], r"^plan\.prefill_tokens must be at most 8190"),
        (["plan.mixed_s=0"], r"^plan\.mixed_s must be"),
        (["expert.engine.kv_cache_dtype=fp8"], r"kv_cache_dtype must be auto for a profile.*'fp8'"),
        (["repeats=0"], "^repeats must be >= 1"),
        (["+plan.bogus=1"], r"^plan\.bogus is not known"),
        (["+bogus=1"], "^bogus is not known"),
        (["fleet=live_cpu"], "^fleet=live_cpu has no effect beside expert"),
        (["fleet=null"], "^fleet must be one of: er_2x70b_fp16, .*; got 'null'; leave it out for"),
    ],
)  # fmt: skip
def test_what_either_would_refuse_is_said_first(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        check_first(*both(*arguments))
    assert len(str(raised.value).splitlines()) == 1


def test_experts_of_another_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "mine.yaml").write_text("model: llama-36m\ngpu: cpu\n")
    mine = ["expert=mine", "--config-dir", str(tmp_path)]
    check_first(mine, [*mine[:1], f"--config-dir={tmp_path}", "users=1,2"])
    with pytest.raises(ConfigError, match="expert/mine"):
        check_first(mine[:1], mine[:1])
    check_first(["--help"], ["--help"])  # neither measures


@pytest.mark.parametrize("command", [live, gpu_session])
def test_a_refusal_ends_the_command_before_it_starts_anything(
    command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(command, "run_to_its_end", never)
    users = ["users=3,4"] if command is live else ["--users", "4,50"]
    monkeypatch.setattr(sys, "argv", ["command", *users])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert command.main() == 2  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGTERM, handler)
    told = capsys.readouterr()
    assert "users must be loads that do not calibrate" in told.err and not told.out


@pytest.mark.parametrize("minutes", ["inf", "nan", "0", "soon"])
def test_a_session_ends_at_some_time(
    minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--minutes", minutes])
    with pytest.raises(SystemExit) as end:
        gpu_session.main()
    assert end.value.code == 2
    assert f"argument --minutes: must be a number > 0, got '{minutes}'" in capsys.readouterr().err


def test_one_bad_expert_stops_the_session_before_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(expert: str, both: object, left_s: float) -> dict[str, object]:
        measured.append(expert)
        return {"expert": expert, "ok": True}

    monkeypatch.setattr(gpu_session, "measure", measure)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(sys, "argv", ["gpu_session", "--experts", "llama3_8b_bf16,foo"])
        assert gpu_session.main() == 2 and not measured
        assert "gpu_session: foo: " in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["gpu_session", "--experts", "llama3_8b_bf16"])
        assert gpu_session.main() == 0 and measured == ["llama3_8b_bf16"]
        assert json.loads(capsys.readouterr().out)["not_reached"] == []
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(("given", "fleet"), [(["expert=tiny_bf16"], []), ([], ["fleet=live_cpu"])])
def test_a_fleet_is_chosen_only_where_nothing_is(
    given: list[str], fleet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(live, "run_to_its_end", lambda command: (ran.append(command[3:]) or 0, ""))
    monkeypatch.setattr(sys, "argv", ["live", *given])
    assert live.main() == 0
    assert ran == [[*fleet, *given]] * 2


def test_an_option_that_nobody_knows_ends_a_session_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--userz", "5"])
    with pytest.raises(SystemExit) as ended:
        gpu_session.main()
    assert ended.value.code == 2 and "no such option: --userz; settings are given" in capsys.readouterr().err
