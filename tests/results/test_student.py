"""Quantiles of Student's t against scipy."""

from __future__ import annotations

import pytest
from scipy.special import stdtrit

from ersim.results.student import t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 11, 12, 99, 500])
@pytest.mark.parametrize("probability", [0.05, 0.5, 0.75, 0.95, 0.995, 0.9995])
def test_quantiles_are_scipys(degrees: int, probability: float) -> None:
    assert t_quantile(degrees, probability) == pytest.approx(
        float(stdtrit(degrees, probability)), rel=1e-10, abs=1e-12
    )


@pytest.mark.parametrize(("degrees", "probability"), [(0, 0.9), (3, 0.0), (3, 1.0)])
def test_what_has_no_quantile_is_refused(degrees: int, probability: float) -> None:
    with pytest.raises(ValueError, match="degrees >= 1"):
        t_quantile(degrees, probability)
