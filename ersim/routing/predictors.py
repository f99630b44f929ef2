"""Predictors of answer quality from feature rows: kNN, ridge, logistic, matrix factorisation, MLP.

`fit` learns the quality of every expert, `fit_gap` the difference between two of them. Predicting
the gap directly beats predicting "the weak one is wrong" (docs/routing.md). Estimators train in
scikit-learn or scipy and keep plain arrays, so that one prediction costs microseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import ConfigError, bad_value, unknown_choice

Floats = npt.NDArray[np.float64]


class Predictor(ABC):
    """rows: (n, dimensions); quality: (n, experts) in [0, 1] without NaN."""

    @abstractmethod
    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """Learn the quality of each column."""

    @abstractmethod
    def predict(self, rows: Floats) -> Floats:
        """Expected quality, shape (len(rows), columns)."""

    def fit_gap(self, rows: Floats, strong: Floats, weak: Floats, seed: int) -> None:
        """Learn strong - weak, each of shape (n,)."""
        self.fit(rows, (strong - weak)[:, None], seed)

    def predict_gap(self, rows: Floats) -> Floats:
        """Expected strong - weak, shape (len(rows),)."""
        return self.predict(rows)[:, 0]


class Knn(Predictor):
    """Mean label of the k nearest training prompts (Euclidean).

    k is capped at a fifth of the training set; None takes twice the root of its size.
    """

    def __init__(self, k: int | None = 100) -> None:
        if k is not None and k < 1:
            raise bad_value("router.params.predictor_params.k", ">= 1", k)
        self.k = k

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """Keep the training rows (in single precision, for speed) and their labels."""
        self._rows = rows.astype(np.float32)
        self._square = np.einsum("ij,ij->i", self._rows, self._rows)
        self._quality = quality
        wanted = round(2.0 * np.sqrt(len(rows))) if self.k is None else self.k
        self._near = max(1, min(wanted, len(rows) // 5))

    def predict(self, rows: Floats) -> Floats:
        """Unweighted means of the neighbours' labels."""
        out = np.empty((len(rows), self._quality.shape[1]))
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256].astype(np.float32)
            # Rounded, so that a batch and a single call agree on ties in spite of their last bits.
            distance = np.round(self._square - 2.0 * (part @ self._rows.T), 5)
            near = np.argpartition(distance, self._near - 1, axis=1)[:, : self._near]
            out[start : start + 256] = self._quality[near].mean(axis=1)
        return out


class Ridge(Predictor):
    """Linear regression with a squared penalty, chosen by generalised cross-validation."""

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """scikit-learn's RidgeCV over penalties from 0.1 to 1,000."""
        from sklearn.linear_model import RidgeCV

        model = RidgeCV(alphas=np.logspace(-1, 3, 13)).fit(rows, quality)
        self._weights = np.atleast_2d(model.coef_).T
        self._bias = np.atleast_1d(model.intercept_)

    def predict(self, rows: Floats) -> Floats:
        """Linear in the rows; not clipped, for the order matters more than the value."""
        out: Floats = rows @ self._weights + self._bias
        return out


class Logistic(Predictor):
    """Multinomial logistic regression; for gaps over {weak better, equal, strong better}."""

    def __init__(self, c: float = 1.0) -> None:
        if not c > 0:
            raise bad_value("router.params.predictor_params.c", "> 0", c)
        self.c = c

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """One model per column; a label between 0 and 1 counts for both classes in proportion."""
        self._models = [self._binary(rows, column) for column in quality.T]

    def predict(self, rows: Floats) -> Floats:
        """Probability that each column's answer is correct."""
        return np.column_stack([_expectation(model, rows) for model in self._models])

    def fit_gap(self, rows: Floats, strong: Floats, weak: Floats, seed: int) -> None:
        """Classes are the signs of the gap, weights its size (equal answers count fully)."""
        gap = strong - weak
        signs = np.sign(gap)
        weights = np.where(signs == 0, 1.0, np.abs(gap))
        self._models = [self._fit_classes(rows, signs, weights)]

    def _binary(self, rows: Floats, label: Floats) -> tuple[Floats, Floats, Floats]:
        doubled = np.vstack([rows, rows])
        classes = np.concatenate([np.ones(len(rows)), np.zeros(len(rows))])
        return self._fit_classes(doubled, classes, np.concatenate([label, 1.0 - label]))

    def _fit_classes(self, rows: Floats, classes: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
        from sklearn.linear_model import LogisticRegression

        used = weights > 0
        values = np.unique(classes[used])
        if len(values) == 1:
            return np.zeros((rows.shape[1], 1)), np.zeros(1), values
        model = LogisticRegression(C=self.c, max_iter=500)
        model.fit(rows[used], classes[used], sample_weight=weights[used])
        if len(values) == 2:
            zero = np.zeros_like(model.coef_)
            return np.vstack([zero, model.coef_]).T, np.concatenate([[0.0], model.intercept_]), values
        return model.coef_.T, model.intercept_, values


def _expectation(model: tuple[Floats, Floats, Floats], rows: Floats) -> Floats:
    """Mean class value under softmax(rows @ weights + bias)."""
    weights, bias, values = model
    logits = rows @ weights + bias
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean: Floats = odds @ values / odds.sum(axis=1)
    return mean


class MatrixFactorisation(Predictor):
    """Quality = sigmoid(model vector . projected prompt + model bias), learnt for all models at once.

    The bilinear form of RouteLLM's matrix factorisation router (Ong et al. 2024, arXiv:2406.18665),
    on absolute labels instead of preferences. rank: size of the shared space; penalty: on squares.
    """

    def __init__(self, rank: int = 8, penalty: float = 3.0) -> None:
        if rank < 1:
            raise bad_value("router.params.predictor_params.rank", ">= 1", rank)
        self.rank, self.penalty = rank, penalty

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """Minimise cross-entropy plus penalty with L-BFGS from a small random start."""
        from scipy.optimize import minimize

        dims, models = rows.shape[1], quality.shape[1]
        rank = min(self.rank, dims)
        start = np.random.default_rng([seed, 0x3F]).normal(0.0, 0.1, (dims + models) * rank + models)
        found = minimize(
            _factor_loss,
            start,
            args=(rows, quality, rank, self.penalty),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 200},
        )
        self._project, self._models, self._bias = _factors(found.x, dims, models, rank)

    def predict(self, rows: Floats) -> Floats:
        """Probability that each model's answer is correct."""
        return _sigmoid(rows @ self._project @ self._models.T + self._bias)

    def fit_gap(self, rows: Floats, strong: Floats, weak: Floats, seed: int) -> None:
        """Learn both models in one factorisation."""
        self.fit(rows, np.column_stack([strong, weak]), seed)

    def predict_gap(self, rows: Floats) -> Floats:
        """Difference of the two probabilities."""
        both = self.predict(rows)
        gap: Floats = both[:, 0] - both[:, 1]
        return gap


def _sigmoid(values: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(-np.clip(values, -30.0, 30.0)))
    return out


def _factors(flat: Floats, dims: int, models: int, rank: int) -> tuple[Floats, Floats, Floats]:
    """Cut the optimiser's vector into projection (dims, rank), model vectors (models, rank), biases."""
    cut = dims * rank
    end = cut + models * rank
    return flat[:cut].reshape(dims, rank), flat[cut:end].reshape(models, rank), flat[end:]


def _factor_loss(
    flat: Floats, rows: Floats, quality: Floats, rank: int, penalty: float
) -> tuple[float, Floats]:
    """Summed cross-entropy with soft labels plus penalty * squares, and its gradient."""
    project, models, bias = _factors(flat, rows.shape[1], quality.shape[1], rank)
    inner = rows @ project
    chance = _sigmoid(inner @ models.T + bias)
    safe = np.clip(chance, 1e-12, 1.0 - 1e-12)
    loss = -float((quality * np.log(safe) + (1.0 - quality) * np.log(1.0 - safe)).sum())
    loss += penalty * float((project**2).sum() + (models**2).sum())
    error = chance - quality
    parts = (
        rows.T @ (error @ models) + 2.0 * penalty * project,
        error.T @ inner + 2.0 * penalty * models,
        error.sum(axis=0),
    )
    return loss, np.concatenate([part.ravel() for part in parts])


class Mlp(Predictor):
    """A small neural network on soft labels (scikit-learn), several columns at once.

    hidden: units of the one hidden layer; penalty: on squared weights. Stops early on a tenth of
    the training prompts when there are 500 or more.
    """

    def __init__(self, hidden: int = 64, penalty: float = 0.01, epochs: int = 200) -> None:
        if hidden < 1:
            raise bad_value("router.params.predictor_params.hidden", ">= 1", hidden)
        self.hidden, self.penalty, self.epochs = hidden, penalty, epochs

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """Squared error (the Brier score) with Adam."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor

        model = MLPRegressor(
            hidden_layer_sizes=(self.hidden,),
            alpha=self.penalty,
            max_iter=self.epochs,
            early_stopping=len(rows) >= 500,
            n_iter_no_change=10,
            random_state=seed % 2**32,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the epoch limit is a choice
            model.fit(rows, quality if quality.shape[1] > 1 else quality[:, 0])
        self._weights, self._biases = model.coefs_, model.intercepts_

    def predict(self, rows: Floats) -> Floats:
        """One forward pass: a rectified hidden layer, a linear output."""
        hidden = np.maximum(rows @ self._weights[0] + self._biases[0], 0.0)
        out: Floats = hidden @ self._weights[1] + self._biases[1]
        return out


class Blend(Predictor):
    """The mean of three predictors: they err differently, so their mean errs less than each.

    Qualities: kNN, ridge and MLP. Gaps: kNN, ridge and logistic, all three in units of the gap; an
    MLP's scatter between seeds is too large on the few hundred labels that a pair often has.
    """

    def __init__(self, k: int | None = None, hidden: int = 64, penalty: float = 1.0, c: float = 0.3) -> None:
        self._for_quality = (Knn(40 if k is None else k), Ridge(), Mlp(hidden, penalty))
        self._for_gap = (Knn(k), Ridge(), Logistic(c))

    def fit(self, rows: Floats, quality: Floats, seed: int) -> None:
        """Fit kNN (k: 40 unless said otherwise), ridge and MLP on the same labels."""
        for part in self._for_quality:
            part.fit(rows, quality, seed)

    def predict(self, rows: Floats) -> Floats:
        """Unweighted mean."""
        total: Floats = np.mean([part.predict(rows) for part in self._for_quality], axis=0)
        return total

    def fit_gap(self, rows: Floats, strong: Floats, weak: Floats, seed: int) -> None:
        """Fit kNN (k: twice the root of the training set unless said otherwise), ridge and logistic."""
        for part in self._for_gap:
            part.fit_gap(rows, strong, weak, seed)

    def predict_gap(self, rows: Floats) -> Floats:
        """Unweighted mean."""
        total: Floats = np.mean([part.predict_gap(rows) for part in self._for_gap], axis=0)
        return total


PREDICTORS: Mapping[str, type[Predictor]] = MappingProxyType(
    {
        "knn": Knn,
        "ridge": Ridge,
        "logistic": Logistic,
        "matrix_factorisation": MatrixFactorisation,
        "mlp": Mlp,
        "blend": Blend,
    }
)


def build_predictor(name: str, params: Mapping[str, Any] | None = None) -> Predictor:
    """Make the predictor registered under `name`; ConfigError lists the choices."""
    if name not in PREDICTORS:
        raise unknown_choice("router.params.predictor", name, PREDICTORS)
    try:
        return PREDICTORS[name](**(params or {}))
    except TypeError as error:
        raise ConfigError(f"router.params.predictor_params: {error}") from error
