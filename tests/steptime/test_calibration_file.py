"""The file format: what is saved loads the same, and what is damaged ends in one clear message."""

from __future__ import annotations

import copy
import json

import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.errors import ConfigError, DataError
from ersim.steptime import build_expert_model, list_files, load, save

SOME = next(path for path in list_files() if path.name == "llama3.1-8b_bf16_tp1_tables.json")


def _damaged(tmp_path, change):
    data = json.loads(SOME.read_text())
    change(data)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(data))
    return path


def test_save_and_load_keep_everything(tmp_path):
    original = load(SOME)
    save(original, tmp_path / "deep" / "copy.json")
    assert load(tmp_path / "deep" / "copy.json") == original
    assert load(tmp_path / "deep" / "copy.json").digest == original.digest
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy.json"]


@pytest.mark.parametrize("path", list_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_committed_file_is_small_and_says_where_it_comes_from(path):
    calibration = load(path)
    assert path.stat().st_size < 100_000
    assert calibration.provenance
    assert calibration.vllm_version


def test_cut_in_half(tmp_path):
    path = tmp_path / "half.json"
    path.write_text(SOME.read_text()[: SOME.stat().st_size // 2])
    with pytest.raises(DataError, match=r"half.json: not a whole JSON document.*cut or damaged"):
        load(path)


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.update(tp="1"), "tp"),
        (lambda d: d.update(source="guess"), "source"),
        (lambda d: d.update(terms=[]), "terms"),
        (lambda d: d["terms"][0].update(kind="quadratic"), r"terms\[0\].kind"),
        (lambda d: d["terms"][1].update(tokens=[2, 1]), r"terms\[1\].tokens"),
        (lambda d: d["terms"][1]["time_us"].pop(), r"terms\[1\].time_us"),
        (lambda d: d["terms"][1]["time_us"].__setitem__(3, -1), r"terms\[1\].time_us"),
        (lambda d: d["terms"][4].update(skew=-0.1), r"terms\[4\].skew"),
        (lambda d: d["terms"][4].update(skew={"sequences": [8, 4], "share": [1, 1]}), r"terms\[4\].skew.seq"),
        (lambda d: d["terms"][4].update(skew={"sequences": [4, 8], "share": [1]}), r"terms\[4\].skew.share"),
        (lambda d: d.update(theta=d["theta"][:-1]), "theta"),
        (lambda d: d["theta"].__setitem__(0, -1), "theta"),
        (lambda d: d["covariance"][0].__setitem__(1, 5.0), "covariance must be symmetric"),
        (lambda d: d["covariance"][0].__setitem__(0, -1.0), "covariance must be positive"),
        (lambda d: d.update(residual_rel_std=None), "residual_rel_std"),
        (lambda d: d["valid"].update(tokens=[5, 1]), "valid.tokens"),
        (lambda d: d.update(kv_blocks="many"), "kv_blocks"),
    ],
)
def test_bad_fields_are_named(tmp_path, change, field):
    with pytest.raises(DataError, match=rf"calibration.json: field {field}"):
        load(_damaged(tmp_path, change))


def test_an_expert_with_another_experts_calibration_is_an_error():
    with pytest.raises(ConfigError, match=r"expert.model must be 'llama3.1-8b'"):
        build_expert_model(
            ExpertConfig(model="llama3.1-70b", tp=4, calibration=str(SOME), gpu=load(SOME).gpu), "expert"
        )


def test_an_unknown_calibration_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"expert.calibration must be one of:.*h100-80gb/llama3.1-8b_bf16"):
        build_expert_model(ExpertConfig(calibration="nonsense"), "expert")


def test_auto_takes_measurements_first_and_labels_a_roofline():
    assert build_expert_model(ExpertConfig(), "expert").calibration.source == "tables"
    roofline = build_expert_model(ExpertConfig(gpu="l40s"), "expert").calibration
    assert not roofline.calibrated
    assert "uncalibrated" in roofline.warnings[0]


def test_a_derived_calibration_says_so():
    warnings = build_expert_model(ExpertConfig(precision="int4"), "expert").calibration.warnings
    assert any("derived, not measured itself: h100-80gb/llama3.1-8b_int4_tp1_tables" in w for w in warnings)
    assert not build_expert_model(ExpertConfig(), "expert").calibration.warnings


def test_settings_beyond_the_range_warn():
    engine = EngineSettings(max_num_batched_tokens=16_384)
    warnings = build_expert_model(ExpertConfig(gpu="a100-80gb", engine=engine), "expert").calibration.warnings
    assert any("max_num_batched_tokens=16384 lies beyond" in warning for warning in warnings)


def test_a_recorded_block_count_wins(tmp_path):
    recorded = copy.deepcopy(json.loads(SOME.read_text()))
    recorded.update(kv_blocks=1234, engine={"max_num_seqs": 64, "max_num_batched_tokens": 2048})
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps(recorded))
    expert = ExpertConfig(gpu=recorded["gpu"], calibration=str(path))
    assert build_expert_model(expert, "expert").engine.kv_blocks == 1234
    expert.engine.max_num_seqs = 128  # other settings, another count
    assert build_expert_model(expert, "expert").engine.kv_blocks != 1234


@pytest.mark.parametrize("tp", [1, 2])
def test_a_cpu_server_takes_more_at_once_with_more_ranks(tmp_path, tp):
    recorded = copy.deepcopy(json.loads(SOME.read_text()))
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({**recorded, "gpu": "cpu", "tp": tp, "kv_blocks": 100, "engine": {}}))
    expert = ExpertConfig(recorded["model"], recorded["precision"], "cpu", tp, calibration=str(path))
    engine = build_expert_model(expert, "expert").engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (128 * tp, 2048 * tp)
