"""What docs/accuracy.md says about estimates of the unmeasured can be worked out again."""

from __future__ import annotations

import numpy as np

from experiments.carried_over import estimates, left_out


def test_estimates_err_as_documented():
    kinds: dict[str, list[float]] = {}
    for kind, _, errors in estimates():
        kinds.setdefault(kind, []).extend(np.abs(errors))
    assert set(kinds) == {"another GPU", "roofline", "another TP", "fp8 from bf16"}
    assert np.mean(kinds["another GPU"]) < np.mean(kinds["roofline"]) < 0.12
    assert np.mean(kinds["another TP"]) < 0.10


def test_less_data_never_predicts_the_series_better():
    def series(errors):
        return np.mean([value for run, value in errors.items() if run.startswith("h200")])

    means = {name: series(errors) for name, errors in left_out()}
    assert means["nothing"] <= means["the row"] <= means["its run"] < 0.06
    assert means["its TP"] < 0.035
