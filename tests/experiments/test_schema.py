"""The command's typed config and what of it the model sees."""

from __future__ import annotations

import pytest

from ersim.config import ExpertConfig, validate
from ersim.errors import ConfigError
from experiments.schema import RunConfig, to_simulation


def test_replications_has_a_short_spelling():
    """Issue text and users write `replications=auto|N`; the long key stays."""
    assert to_simulation(RunConfig()).uncertainty.replications == "auto"
    run = RunConfig(replications="3")
    assert to_simulation(run).uncertainty.replications == "3"
    assert run.uncertainty.replications == "auto"  # the config as given is left alone
    bad = to_simulation(RunConfig(replications="few"))
    bad.fleet.experts = {"a": ExpertConfig()}
    with pytest.raises(ConfigError, match="replications must be auto or an integer >= 1, got 'few'"):
        validate(bad)
