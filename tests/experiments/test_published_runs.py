"""Reading published runs: all three kinds, names of GPUs and models, defaults by release."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

from ersim.errors import DataError
from experiments import validate_published
from experiments.observe_runs import fold, kept_rows
from experiments.overheads import load_observations, load_prior
from experiments.published_names import (
    engine_fields,
    engine_settings,
    gpu_name,
    model_name,
    precision_name,
    version,
)
from experiments.published_runs import make_workload, metric_name, read_runs, request_count
from experiments.published_workloads import PooledUsers
from experiments.simulate_published import taken_in_s
from experiments.validate_published import (
    Comparison,
    Options,
    _is_of,
    judged_expert,
    notes_of,
    predict,
    report,
    with_predicted_blocks,
)

ROWS = """model,gpu,precision,isl,osl,concurrency,tp,ttft_ms,tpot_ms
meta-llama/Llama-3.1-8B,h100_sxm,fp8,256,64,4,1,60,6.5
"""
STAGE_COLUMNS = (
    *("exp_id", "model", "hardware", "tp", "precision", "vllm", "stage", "rate_rps", "duration_s"),
    *("distinct_prompts", "system_prompt_tokens", "question_tokens", "output_tokens", "max_num_seqs"),
    *("max_num_batched_tokens", "max_model_len", "gpu_mem_util", "gpu_kv_blocks_16tok", "e2e_mean_ms"),
    *("ttft_mean_ms", "tpot_mean_derived_ms"),
)
STAGE = "3,meta-llama/Llama-3.1-8B,A100-80GB,1,FP16/BF16,v0.15.1,{},2,20,5,100,400,32,128,2048,4096,0.9,,"
STAGES = "\n".join(
    [",".join(STAGE_COLUMNS), *(STAGE.format(stage) + "400,40,11.5" for stage in ("0", "all")), ""]
)
REQUESTS = """prompt_tokens,output_tokens,arrival_dataset_s,ttft_ms,tpot_ms,e2e_ms
600,20,0.1,80,18,420
300,30,0.2,90,18,610
"""


def _folder(tmp_path, name, run, file, text):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / file).write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    closed = {"kind": "closed_loop_rows", "precision": "fp8", "tp": "per row", "engine": {"defaults": True}}
    _folder(
        tmp_path, "closed", closed | {"gpu": {"name": "NVIDIA H100"}, "model": "per row"}, "rows.csv", ROWS
    )
    staged = {"kind": "open_loop_stages", "vllm": "0.15.1", "gpu": {"name": "A100 80GB"}, "model": "per row"}
    staged |= {"precision": "bf16", "tp": "per row", "engine": {"max_num_seqs": 128, "policy": "fcfs"}}
    _folder(tmp_path, "staged", staged, "stages.csv", STAGES)
    single = {
        "kind": "per_request",
        "vllm": "0.19.0",
        "gpu": {"name": "RTX 4090"},
        "precision": "bf16",
        "tp": 1,
    }
    single |= {"model": "meta-llama/Llama-3.1-8B", "prefix_blocks": "blocks.json"}
    single |= {"engine": {"num_gpu_blocks": 2588, "max_model_len": 4096, "max_num_seqs": 256}}
    folder = _folder(tmp_path, "single", single, "requests.csv", REQUESTS)
    (folder / "blocks.json").write_text(json.dumps([list(range(37)), list(range(18))]))
    return tmp_path


def test_all_kinds_are_read(runs):
    closed, single, staged = read_runs(runs)
    assert (closed.expert.gpu, closed.expert.precision, closed.users) == ("h100-80gb", "fp8", 4)
    assert closed.expert.engine.kv_cache_dtype == "fp8" and "InferenceMAX" in closed.notes[0]
    assert single.expert.engine.kv_blocks == 2588 and single.measured[""]["mean_e2el_ms"] == 515
    assert staged.expert.engine.async_scheduling and staged.expert.engine.max_num_batched_tokens == 2048
    assert set(staged.measured) == {"0", "all"}
    assert [fold(case) for case in (closed, single, staged)] == ["tp1", "all", "all"]


def test_every_kind_is_predicted_with_an_interval(runs):
    rows = [row for case in read_runs(runs) for row in predict(case, Options(replications=4))]
    assert len(rows) == 2 + 5 + 2 * 3
    assert all(0 < row.low < row.predicted < row.high for row in rows)
    assert all(row.half_width <= 0.2501 for row in rows)
    figures = report(rows, [], [])
    assert len(figures["records"]) == len(rows) and {"measured", "error"} <= set(figures["records"][0])


def test_workloads_match_their_description(runs):
    closed, single, staged = read_runs(runs)
    pooled = make_workload(closed, seed=1)
    drawn = [pooled.next_request(user % 4) for user in range(request_count(closed, pooled))]
    assert len(drawn) == 40
    assert all(204 <= request.prompt_tokens <= 256 for request in drawn)
    arrivals = list(make_workload(staged, seed=1).arrivals())
    assert len({request.segments[1].content_id for request in arrivals}) <= 5
    assert np.isclose(len(arrivals), 40, rtol=0.5)
    assert [request.block_keys[-1] for request in make_workload(single, seed=0).arrivals()] == [36, 17]


def test_an_empty_pool_leaves_users_idle():
    users = PooledUsers(2, [10, 20, 30], [1, 2, 3])
    assert [users.next_request(0).request_id, users.next_request(1).request_id] == [0, 1]
    assert users.think_s(0) == 0.0
    assert users.think_s(1) > 1e9


def test_names_and_releases():
    assert gpu_name("NVIDIA A100-SXM4-40GB", "x") == "a100-40gb"
    assert gpu_name("NVIDIA RTX PRO 6000 Blackwell Server Edition", "x") == "rtxpro6000"
    assert model_name("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8", "x") == "llama3.1-70b"
    assert [precision_name(x) for x in ("FP16/BF16", "W8A8-int8", "AWQ", "fp8")] == [
        "bf16",
        "int8",
        "int4",
        "fp8",
    ]
    assert version("v0.15.1") == (0, 15, 1) and version("unrecorded (late 2025)") is None
    assert engine_settings({}, (0, 11, 0))["async_scheduling"] is False
    assert engine_settings({"max_num_seqs": "per row", "max_model_len": 4096}, None) == {
        "max_model_len": 4096
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run: run.update(kind="other"), "kind must be one of"),
        (lambda run: run.update(gpu={"name": "TPU v9"}), "gpu 'TPU v9' is not known"),
        (lambda run: run.update(model="acme/NeverHeard-9B"), "model 'acme/NeverHeard-9B' is not known"),
        (lambda run: run.update(requests="absent.csv"), "absent.csv is missing"),
    ],
)
def test_bad_runs_are_explained(runs, change, match):
    path = runs / "single" / "run.yaml"
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(DataError, match=match):
        read_runs(runs)


def test_bad_runs_leave_the_others_unharmed(runs):
    """What further folders may bring: other GPUs and models, gaps, broken files."""
    rows = ROWS + ROWS.splitlines()[1].replace("Llama-3.1-8B", "Nobody-9B") + "\n"
    rows += ROWS.splitlines()[1].replace(",60,6.5", ",,") + "\n"
    (runs / "closed" / "rows.csv").write_text(rows)
    _folder(runs, "broken", {}, "rows.csv", ROWS)
    (runs / "broken" / "run.yaml").write_text("kind: [closed")
    other = {"kind": "closed_loop_rows", "gpu": "NVIDIA L40S", "precision": "fp8", "engine": {}}
    _folder(runs, "l40s", other | {"vllm": 0.1, "model": "Qwen/Qwen2.5-14B-Instruct"}, "rows.csv", ROWS)
    _folder(runs, "pipelined", other | {"engine": {"pipeline_parallel_size": 2}}, "rows.csv", ROWS)
    skipped: list[str] = []
    cases = {case.run: case for case in read_runs(runs, skipped)}
    assert set(cases) == {"closed", "single", "staged", "l40s"}
    assert (cases["l40s"].expert.gpu, cases["l40s"].expert.model) == ("l40s", "qwen2.5-14b")
    assert cases["l40s"].expert.engine.async_scheduling is False  # 0.10 reads as 0.1
    assert len(skipped) == 4
    for words in (
        "not valid YAML",
        "Nobody-9B",
        "row 2: holds no latency",
        "pipeline_parallel_size=2 is not",
    ):
        assert sum(words in line for line in skipped) == 1, words


def test_a_run_with_gaps_is_read(runs):
    head = "prompt_tokens,output_tokens,arrival_s,ttft_ms,e2e_ms\n"
    (runs / "single" / "requests.csv").write_text(head + "600,21,0.1,80,480\n300,0,0.2,,\n90,1,0.3,20,20\n")
    path = runs / "single" / "run.yaml"
    data = yaml.safe_load(path.read_text())
    del data["prefix_blocks"], data["vllm"], data["engine"]["max_model_len"]
    path.write_text(yaml.safe_dump(data))
    (case,) = read_runs(runs / "single")
    assert len(list(make_workload(case, 0).arrivals())) == 2 and "1 requests without" in case.notes[0]
    assert case.measured[""]["mean_tpot_ms"] == 20 and case.measured[""]["mean_ttft_ms"] == 50
    assert case.expert.engine.max_model_len == 621 + 256
    head = "stage,rate_rps,n_requests,prompt_tokens,output_tokens,ttft_p50_ms\n"
    (runs / "staged" / "stages.csv").write_text(head + "a,2,10,400,32,40\nall,2,10,400,32,41\n")
    data = yaml.safe_load((runs / "staged" / "run.yaml").read_text())
    (runs / "staged" / "run.yaml").write_text(yaml.safe_dump(data | {"model": "llama-3.1-8b", "tp": 1}))
    (case,) = read_runs(runs / "staged")
    assert case.measured == {"a": {"median_ttft_ms": 40}, "all": {"median_ttft_ms": 41}}
    assert case.sessions == {"a": 0} and case.workload["stages"][0]["duration_s"] == 5


def test_recorded_settings_win():
    found = engine_settings(
        {
            "max_num_seqs": 256.0,
            "max_num_batched_tokens": "4,096",
            "kv_cache_dtype": "fp8_e4m3",
            "chunked_prefill": "False",
            "gpu_kv_blocks_16tok": 30251,
            "max_model_len": "per row",
            "policy": "unrecorded",
        },
        (0, 19),
    )
    assert found["max_num_seqs"] == 256 and isinstance(found["max_num_seqs"], int)
    assert (found["max_num_batched_tokens"], found["kv_blocks"]) == (4096, 30251)
    assert found["kv_cache_dtype"] == "fp8" and found["enable_chunked_prefill"] is False
    assert "max_model_len" not in found and "policy" not in found
    with pytest.raises(DataError, match="block_size must be a number, got 'sixteen'"):
        engine_settings({"block_size": "sixteen"}, None)


def test_a_judged_run_never_saw_itself_under_any_folder_name(runs):
    """Leave-one-run-out goes by what was measured, not by what the folder is called."""
    known = next(row for row in load_observations() if row.run.startswith("h200"))
    (case, *_) = read_runs(runs / "closed")

    def of(row, tpot_ms):
        gpu, name = row.calibration.split("/")
        model, precision, tp, _ = name.split("_")
        same = {"gpu": gpu, "model": model, "precision": precision, "tp": int(tp.removeprefix("tp"))}
        expert = dataclasses.replace(case.expert, **same)
        return dataclasses.replace(case, expert=expert, measured={"": {"mean_tpot_ms": tpot_ms}})

    renamed = of(known, known.tpot_ms * (1 + 1e-6))
    assert not any(_is_of(row, case, False) for row in load_observations())
    assert _is_of(known, renamed, False)
    assert not _is_of(known, dataclasses.replace(renamed, expert=case.expert), False)  # another GPU
    assert _is_of(known, dataclasses.replace(case, run=known.run), True)
    one_digit = next(row for row in load_observations() if row.run == "rtx4090_llama3.1-8b_tp1")
    assert _is_of(one_digit, of(one_digit, round(one_digit.tpot_ms, 1)), False)  # a copy that was rounded
    rounded = next(row for row in load_observations() if row.known_within_ms > 0.01)
    assert _is_of(rounded, of(rounded, rounded.tpot_ms + 0.8 * rounded.known_within_ms), False)
    assert not _is_of(rounded, of(rounded, 1.01 * rounded.tpot_ms), False)


def test_rows_that_hang_on_other_terms_are_not_kept():
    prior, rows = load_prior(), load_observations()
    assert kept_rows({row.run for row in rows}, prior) == []
    assert len(kept_rows((), prior)) == len(rows)
    moved = dataclasses.replace(prior, mean=1.1 * prior.mean)
    with pytest.raises(
        DataError, match=r"rtx4090_llama3\.1-8b_tp1.*observed with other prior means or terms"
    ):
        kept_rows({row.run for row in rows if "rtx4090" not in row.run}, moved)


def test_another_gpus_calibration_is_carried_over_when_asked(runs):
    (case,) = read_runs(runs / "closed")
    own, other = judged_expert(case), judged_expert(case, Options(other_gpus=True))
    assert own.calibration.name.startswith("h100-80gb/")
    assert "carried over from h200-141gb/llama3.1-8b_fp8_tp1" in other.calibration.name
    rows = [(row.error, row.half_width) for row in predict(case, Options(2, other_gpus=True))]
    assert len(rows) == 2 and all(width <= 0.2501 for _, width in rows)


def test_steps_beyond_a_calibrations_range_are_said(runs, monkeypatch):
    (case,) = read_runs(runs / "closed")
    expert = judged_expert(case)
    assert not any("beyond its range" in row.calibration for row in predict(case, Options(2)))
    narrow = dataclasses.replace(
        expert.calibration, valid={**expert.calibration.valid, "context_tokens": (0, 8), "tokens": (1, 8)}
    )
    monkeypatch.setattr(
        validate_published,
        "judged_expert",
        lambda case, options: dataclasses.replace(expert, calibration=narrow),
    )
    rows = predict(case, Options(2))
    assert all(row.calibration.endswith("(steps beyond its range: context_tokens, tokens)") for row in rows)


def test_statistics_are_named_as_they_are_measured():
    assert metric_name("ttft_ms") == "mean_ttft_ms" and metric_name("ttft_ms", "median") == "median_ttft_ms"
    assert (
        metric_name("e2e_p50_ms") == "median_e2el_ms"
        and metric_name("tpot_mean_derived_ms") == "mean_tpot_ms"
    )
    assert metric_name("itl_mean_reported_ms") is None


def test_a_measurement_outside_is_said():
    row = Comparison("r", "x", "", "mean_ttft_ms", 10.0, 12.0, 11.0, 13.0, "c", "")
    assert not row.inside and row.error == pytest.approx(0.2)


def test_a_cut_interval_is_counted_and_its_loss_said(capsys):
    fine = Comparison("r", "x", "", "mean_ttft_ms", 10.0, 10.0, 9.0, 11.0, "c", "")
    lost = dataclasses.replace(fine, measured=14.0, low=8.0, high=12.5, uncut=(6.0, 16.0))
    kept = dataclasses.replace(lost, measured=12.0)
    extra = dataclasses.replace(lost, variant="with something else")
    assert lost.lost_by_cut and not kept.lost_by_cut and not fine.lost_by_cut
    told = report([fine, lost, kept, extra], [], [])
    assert (told["figures"], told["cut"], told["lost_by_cut"]) == (3, 2, 1)
    assert told["inside_share"] == pytest.approx(2 / 3), "an extra is not judged"
    assert "2 of 3 intervals were wider than ±25 %" in capsys.readouterr().out


def test_recorded_kv_blocks_are_predicted_as_well(runs):
    closed, single, _ = read_runs(runs)
    assert with_predicted_blocks(closed) is None
    free = with_predicted_blocks(single)
    assert free is not None and free.expert.engine.kv_blocks is None
    assert "not the recorded 2,588" in free.variant


def test_a_run_that_was_looked_at_is_said_to_be_not_blind_under_any_name(runs):
    _, single, _ = read_runs(runs)
    assert not any("NOT BLIND" in note for note in notes_of([single]))
    seen = next(row for row in load_observations() if row.run == "rtx4090_llama3.1-8b_tp1")
    expert = dataclasses.replace(single.expert, gpu="rtx4090", model="llama3.1-8b", precision="bf16", tp=1)
    measured = {"": {"mean_tpot_ms": seen.tpot_ms}}
    copy = dataclasses.replace(single, run="copy", expert=expert, measured=measured)
    assert any(note.startswith("copy is NOT BLIND") for note in notes_of([copy]))
    assert any("NOT BLIND" in note for note in notes_of([dataclasses.replace(single, run=seen.run)]))
    taught = next(note for note in notes_of([copy]) if note.startswith("copy: coefficients fitted on"))
    assert "rtx4090_llama3.1-8b_tp1_earlier" in taught and "rtx4090_llama3.1-8b_tp1," not in taught


def test_requests_are_taken_in_between_steps():
    end, duration = np.asarray([1.0, 2.0, 5.0]), np.asarray([1.0, 1.0, 1.0])
    queued = taken_in_s(np.asarray([0.5, 1.5, 3.0, 4.5, 6.0]), end, duration)
    assert queued.tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]
    assert taken_in_s(end, np.empty(0), np.empty(0)).tolist() == end.tolist()


def test_engine_settings_may_be_a_command_line():
    flags = ["--max-num-seqs", "64", "--no-enable-prefix-caching", "--enable-chunked-prefill"]
    expected = {"max_num_seqs": "64", "enable_prefix_caching": False, "enable_chunked_prefill": True}
    assert engine_fields(flags) == expected == engine_fields(" ".join(flags).replace("seqs ", "seqs="))
    assert engine_fields({"max_num_seqs": 8}) == {"max_num_seqs": 8} and engine_fields(None) == {}
    read = engine_settings(engine_fields(flags), None)
    assert read == {"max_num_seqs": 64, "enable_prefix_caching": False, "enable_chunked_prefill": True}


@pytest.mark.parametrize("text", ["NVFP4", "mxfp4", "gguf Q4_K_M", "w4a4"])
def test_a_precision_that_is_not_modelled_is_refused(text):
    with pytest.raises(DataError, match="not modelled"):
        precision_name(text)


def test_impossible_lengths_are_named_and_single_tokens_have_no_tpot(tmp_path):
    run = {"kind": "closed_loop_rows", "gpu": "H100", "model": "Llama-3.1-8B", "precision": "bf16", "tp": 1}
    folder = _folder(tmp_path, "odd", run, "rows.csv", "isl,osl,concurrency,ttft_ms,tpot_ms\n128,1,1,9,7\n")
    (case,) = read_runs(folder)
    assert [row.metric for row in predict(case, Options(2))] == ["mean_ttft_ms"]
    _folder(tmp_path, "odd2", run, "rows.csv", "isl,osl,concurrency,ttft_ms\n-5,1,1,9\n")
    with pytest.raises(DataError, match="isl must be a whole number >= 1"):
        read_runs(tmp_path / "odd2")
