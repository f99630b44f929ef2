"""Steps of one expert while its neighbours were busy, and the fit of what those cost it.

A host that others use too (it is probed, see `host_speed`) has moods that the probe does not see: each round
of common load gets a factor of its own, near 1, and the time alone is what the calibration says. A GPU has no
moods: there one factor, on all rounds, holds what gateway and front ends add to every step. Where neighbours
ran all the time nothing tells the two apart, so that factor is held near 1 too (not seen on a GPU yet).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from testbed.sensitivity import BLOCK_S

FloatArray = npt.NDArray[np.float64]
BLOCK_STD = 0.07  # relative, of blocks of `BLOCK_S` beyond a former probe: in three profiles
ROUND_STD = 0.05  # relative, of rounds beyond a former probe: in the common load of five profiles
BASE_STD = 0.05  # of the steady factor, and of blocks on a steady host: guesses, nobody has measured them
STEADY_STD = 0.01
USUAL_SLOWDOWN = 0.015
"""Where waiting is counted apart: of the CPU time of two experts in the runs of two measurements, made beside
a former probe, with exponents of 1.4 for steps of one row."""
SLOWDOWN_STD = 0.015  # as far as those were apart
MOST_TURNS = 200
REFITS = 40
DIGITS = 6


@dataclass(frozen=True)
class CommonLoadFit:
    """base: on the time alone; slowdowns: by neighbour, over base; factors: by round; token_wait_s: see
    `CommonLoad.token_wait_s`."""

    base: float
    slowdowns: FloatArray
    factors: FloatArray
    token_wait_s: float = 0.0


@dataclass(frozen=True)
class CommonLoad:
    """Arrays over steps. shares: as felt, a column per neighbour; rounds: index of each one's round.

    told_s: time alone; measured_s: at slowness 1. round_count: of all rounds, those without steps included.
    traffic: tokens that each shares its core with (see `contention`); waited_s: for others than its own front
    end, at slowness 1, NaN where that is not known.
    """

    told_s: FloatArray
    measured_s: FloatArray
    shares: FloatArray
    rounds: npt.NDArray[np.int64]
    ends_s: FloatArray
    round_count: int
    traffic: FloatArray
    waited_s: FloatArray

    def only(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> CommonLoad:
        """Some of the steps."""
        arrays = ("told_s", "measured_s", "shares", "rounds", "ends_s", "traffic", "waited_s")
        return replace(self, **{name: getattr(self, name)[chosen] for name in arrays})

    def modelled_s(self, fit: CommonLoadFit) -> FloatArray:
        """What the fit says of each step, seconds, shape (steps,)."""
        loaded: FloatArray = fit.base * self.told_s * (1.0 + self.shares @ fit.slowdowns)
        return loaded * fit.factors[self.rounds] + fit.token_wait_s * self.traffic

    @property
    def waits_counted(self) -> bool:
        """Whether any step knows what it waited for."""
        return not np.isnan(self.waited_s).all()

    def token_wait_s(self) -> float:
        """Seconds that a step waits for each token of its traffic; 0 where no step tells.

        The median of blocks of `BLOCK_S`, each counting as much traffic as there was in it. Within a
        block all that was waited counts, since single waits are a time slice or nothing; of blocks other work
        on the machine may have disturbed some (steps waited four times as long in a quarter of a profile's).
        """
        known = (self.traffic > 0.0) & ~np.isnan(self.waited_s)
        if not known.any():
            return 0.0
        _, block = np.unique((self.ends_s[known] / BLOCK_S).astype(int), return_inverse=True)
        tokens = np.bincount(block, self.traffic[known])
        each_s = np.bincount(block, self.waited_s[known]) / tokens
        order = np.argsort(each_s)
        half = np.searchsorted(np.cumsum(tokens[order]), tokens.sum() / 2)
        return max(0.0, float(each_s[order][half]))

    def over_modelled(self, fit: CommonLoadFit) -> FloatArray:
        """By round: seconds measured over seconds modelled; 1 where there was no step."""
        modelled_s = self.modelled_s(fit)
        members = [self.rounds == one for one in range(self.round_count)]
        took = [(self.measured_s[row].sum(), modelled_s[row].sum()) for row in members]
        return np.array([real / said if said else 1.0 for real, said in took])

    def fit_steady(self, usual: float = 0.0) -> CommonLoadFit:
        """One factor >= 1 on the time alone and the slowdowns; for a host that nothing else disturbs.

        usual: what the factor is above 1 before anything is seen, relative; held to by `BASE_STD`.
        """
        columns = np.column_stack([np.ones(len(self.told_s)), self.shares])
        prior = np.sqrt(BLOCK_S) * STEADY_STD / BASE_STD  # as so many seconds of steps would hold it
        row = np.array([prior] + [0.0] * self.shares.shape[1])
        added, *slowdowns = self._nonnegative(
            columns, self.measured_s, (row[None], np.array([prior * usual]))
        )
        base = 1.0 + float(added)
        return CommonLoadFit(base, np.array(slowdowns) / base, np.ones(self.round_count))

    def round_trust(self) -> FloatArray:
        """By round: how far its own mean counts against 1, from how many blocks of `BLOCK_S` it has.

        Blocks scatter by `BLOCK_STD`, rounds by `ROUND_STD`.
        """
        block = (self.ends_s / BLOCK_S).astype(int)
        blocks = np.array([len(np.unique(block[self.rounds == one])) for one in range(self.round_count)])
        trust: FloatArray = blocks / (blocks + (BLOCK_STD / ROUND_STD) ** 2)
        return trust

    def fit_rounds(self, trust: FloatArray, usual: FloatArray | None = None) -> CommonLoadFit:
        """The slowdowns and a factor for each round, in turn until neither moves.

        A round's factor is its mean ratio, drawn towards 1 as its trust is small (see `round_trust`). usual:
        slowdown by each neighbour before anything is seen, `USUAL_SLOWDOWN` by default; held to by
        `SLOWDOWN_STD` where waiting is counted apart. Elsewhere it is in the slowdowns, of which nothing is
        known.
        """
        token_wait_s, factors, held = self.token_wait_s(), np.ones(self.round_count), None
        rest_s = self.measured_s - token_wait_s * self.traffic
        if self.waits_counted:
            prior = np.sqrt(BLOCK_S) * BLOCK_STD / SLOWDOWN_STD  # as so many seconds of steps would hold it
            count = self.shares.shape[1]
            held = prior * np.eye(count), prior * (np.full(count, USUAL_SLOWDOWN) if usual is None else usual)
        members = [self.rounds == one for one in range(self.round_count)]
        for _ in range(MOST_TURNS):
            slowdowns = self._nonnegative(self.shares, rest_s / factors[self.rounds], held)
            loaded = self.told_s * (1.0 + self.shares @ slowdowns)
            took = [(rest_s[row].sum(), loaded[row].sum()) for row in members]
            before = factors
            factors = np.array([real / said if said and real > 0.0 else 1.0 for real, said in took]) ** trust
            if np.allclose(before, factors, rtol=0.0, atol=1e-6):
                break
        return CommonLoadFit(1.0, slowdowns, factors, token_wait_s)

    def _nonnegative(
        self,
        columns: FloatArray,
        loaded_s: FloatArray,
        held: tuple[FloatArray, FloatArray] | None = None,
    ) -> FloatArray:
        """Coefficients >= 0 of columns x time alone that, with the time alone, make the steps' `loaded_s`.

        held: more rows of coefficients' weights, and what each should make.
        """
        if columns.shape[1] == 0:  # which SciPy's nnls does not survive
            return np.zeros(0)
        weight = 1.0 / np.sqrt(self.told_s)  # between single steps (1/told) and sums (1)
        wanted = (loaded_s - self.told_s) * weight
        matrix = columns * (self.told_s * weight)[:, None]
        if held is not None:
            matrix, wanted = np.vstack([matrix, held[0]]), np.concatenate([wanted, held[1]])
        found: FloatArray = nnls(matrix, wanted)[0]
        return found

    def refits(self, fit: CommonLoadFit, steady: bool, rng: np.random.Generator) -> list[list[float]]:
        """[base, *slowdowns, token_wait_s] fitted to other moments; none below three blocks.

        Blocks of `BLOCK_S` seconds are drawn with replacement, and so are the moods of rounds (or the steady
        factor's usual value), from what is usual: they and the neighbours look alike within a round.
        """
        block = (self.ends_s / BLOCK_S).astype(int)
        members = [np.flatnonzero(block == one) for one in np.unique(block)]
        if len(members) < 3:
            return []
        found, trust = [], self.round_trust()
        for _ in range(REFITS):
            chosen = self.only(
                np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            )
            if steady:
                again = chosen.fit_steady(BASE_STD * rng.standard_normal())
            else:
                moods = np.exp(ROUND_STD * rng.standard_normal(len(fit.factors))) / fit.factors
                waits_s = chosen.token_wait_s() * chosen.traffic  # which no mood is on
                moved_s = (chosen.measured_s - waits_s) * moods[chosen.rounds] + waits_s
                held_to: FloatArray | None = None
                if self.waits_counted:  # draws nothing where nothing is held
                    noise = np.array(rng.standard_normal(self.shares.shape[1]))
                    held_to = USUAL_SLOWDOWN + SLOWDOWN_STD * noise
                again = replace(chosen, measured_s=moved_s).fit_rounds(trust, held_to)
            found.append(
                [float(f"{value:.{DIGITS}g}") for value in (again.base, *again.slowdowns, again.token_wait_s)]
            )
        return found
