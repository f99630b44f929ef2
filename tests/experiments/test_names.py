"""Names that nobody reads are refused, with the plus that lets Hydra take them too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ersim.errors import ConfigError
from experiments import live_schema, schema
from experiments.names import check_names

CONF = str(Path(__file__).resolve().parents[2] / "conf")


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("config", "+bogus=1", r"^bogus is not known\. There are at the top: .*users, workload$"),
        ("config", "+workload.think=1", r"^workload\.think is not known; did you mean think_s\?"),
        ("config", "+fleet.experts.code.engine.max_num_seq=1", "did you mean max_num_seqs"),
        ("live/profile", "+bogus=1", "^bogus is not known"),
        ("live/profile", "+plan.bogus=1", r"^plan\.bogus is not known.*under plan: .*mixed_users"),
        ("live/profile", "+expert.engine.bogus=1", r"^expert\.engine\.bogus is not known.*watermark"),
        ("live/validate", "+fleet.experts.large.live_=1", r"^fleet\.experts\.large\.live_ is not known"),
    ],
)
def test_a_name_that_is_not_in_the_schema_is_refused(config: str, override: str, message: str) -> None:
    schema.register()
    live_schema.register()
    chosen = ["expert=tiny_bf16"] if config == "live/profile" else []
    with initialize_config_dir(CONF, version_base="1.3"):
        check_names(compose(config, overrides=chosen))
        with pytest.raises(ConfigError, match=message):
            check_names(compose(config, overrides=[*chosen, override]))


def test_free_names_stay_free() -> None:
    schema.register()
    added = ["+router.params.mine=1", "+fleet.experts.code.live.port=1", "+workload.domain_weights.code=2"]
    with initialize_config_dir(CONF, version_base="1.3"):
        check_names(compose("config", overrides=added))


def test_both_kinds_of_command_refuse_it() -> None:
    schema.register()
    live_schema.register()
    with initialize_config_dir(CONF, version_base="1.3"):
        with pytest.raises(ConfigError, match=r"^bogus is not known"):
            schema.to_run(compose("config", overrides=["+bogus=1"]))
        with pytest.raises(ConfigError, match=r"^bogus is not known"):
            live_schema.to_live(compose("live/validate", overrides=["+bogus=1"]))
