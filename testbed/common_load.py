"""Steps of one expert while its neighbours were busy, and the fit of what those cost it.

A host that others use too (it is probed, see `host_speed`) has moods that the probe does not see: each round
of common load gets a factor of its own, near 1, and the time alone is what the calibration says. A GPU has no
moods: there one factor, on all rounds, holds what gateway and front ends add to every step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from testbed.sensitivity import BLOCK_S, BLOCK_STD

FloatArray = npt.NDArray[np.float64]
ROUND_STD = 0.05  # relative, of rounds beyond the probe: in the common load of five profiles
MOST_TURNS = 200
REFITS = 40
DIGITS = 6


@dataclass(frozen=True)
class CommonLoadFit:
    """base: on the time alone; slowdowns: by neighbour, over base; factors: by round."""

    base: float
    slowdowns: FloatArray
    factors: FloatArray


@dataclass(frozen=True)
class CommonLoad:
    """Arrays over steps. shares: as felt, a column per neighbour; rounds: indices of the rounds.

    told_s: time alone; measured_s: at slowness 1.
    """

    told_s: FloatArray
    measured_s: FloatArray
    shares: FloatArray
    rounds: npt.NDArray[np.int64]
    ends_s: FloatArray

    def only(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> CommonLoad:
        """Some of the steps."""
        return CommonLoad(*(getattr(self, item.name)[chosen] for item in fields(self)))

    def modelled_s(self, fit: CommonLoadFit) -> FloatArray:
        """What the fit says of each step, seconds, shape (steps,)."""
        loaded: FloatArray = fit.base * self.told_s * (1.0 + self.shares @ fit.slowdowns)
        return loaded * fit.factors[self.rounds]

    @property
    def _rounds(self) -> int:
        return int(self.rounds.max()) + 1

    def fit_steady(self) -> CommonLoadFit:
        """One factor >= 1 on the time alone and the slowdowns; for a host that nothing else disturbs."""
        columns = np.column_stack([np.ones(len(self.told_s)), self.shares])
        added, *slowdowns = self._nonnegative(columns)
        base = 1.0 + float(added)
        return CommonLoadFit(base, np.array(slowdowns) / base, np.ones(self._rounds))

    def fit_rounds(self) -> CommonLoadFit:
        """The slowdowns and a factor for each round, in turn until neither moves.

        A round's factor is its mean ratio, drawn towards 1 as its blocks of `BLOCK_S` are few: they scatter
        by `BLOCK_STD`, rounds by `ROUND_STD`.
        """
        factors = np.ones(self._rounds)
        members = [self.rounds == one for one in range(len(factors))]
        block = (self.ends_s / BLOCK_S).astype(int)
        blocks = np.array([len(np.unique(block[row])) for row in members])
        trust = blocks / (blocks + (BLOCK_STD / ROUND_STD) ** 2)
        for _ in range(MOST_TURNS):
            slowdowns = self._nonnegative(self.shares, factors[self.rounds])
            loaded = self.told_s * (1.0 + self.shares @ slowdowns)
            took = [(self.measured_s[row].sum(), loaded[row].sum()) for row in members]
            before = factors
            factors = np.array([real / said if said else 1.0 for real, said in took]) ** trust
            if np.allclose(before, factors, rtol=0.0, atol=1e-6):
                break
        return CommonLoadFit(1.0, slowdowns, factors)

    def _nonnegative(self, columns: FloatArray, factors: FloatArray | float = 1.0) -> FloatArray:
        """Coefficients >= 0 of columns x time alone that, with the time alone, make the steps."""
        if columns.shape[1] == 0:  # which SciPy's nnls does not survive
            return np.zeros(0)
        weight = 1.0 / np.sqrt(self.told_s)  # between single steps (1/told) and sums (1)
        wanted = (self.measured_s / factors - self.told_s) * weight
        found: FloatArray = nnls(columns * (self.told_s * weight)[:, None], wanted)[0]
        return found

    def refits(self, fit: CommonLoadFit, steady: bool, rng: np.random.Generator) -> list[list[float]]:
        """[base, *slowdowns] fitted to other moments; none below three blocks.

        Blocks of `BLOCK_S` seconds are drawn with replacement, and so are the moods of rounds, from what is
        usual: a round's mood and its neighbours look alike, and only rounds tell them apart.
        """
        block = (self.ends_s / BLOCK_S).astype(int)
        members = [np.flatnonzero(block == one) for one in np.unique(block)]
        if len(members) < 3:
            return []
        found = []
        for _ in range(REFITS):
            chosen = self.only(
                np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            )
            if not steady:
                moods = np.exp(ROUND_STD * rng.standard_normal(len(fit.factors))) / fit.factors
                moved = chosen.measured_s * moods[chosen.rounds]
                chosen = CommonLoad(chosen.told_s, moved, chosen.shares, chosen.rounds, chosen.ends_s)
            again = chosen.fit_steady() if steady else chosen.fit_rounds()
            found.append([float(f"{value:.{DIGITS}g}") for value in (again.base, *again.slowdowns)])
        return found
