"""Numbers out of prompt text: tf-idf + SVD, sentence embedding, surface counts, length, or several at once.

`build_features("tfidf+surface", seed-free params)` makes the extractor that policies use. Every
extractor reads one prompt at a time in the same arithmetic, so that a batch and single calls give
bit-equal rows: the simulator precomputes what the gateway computes per request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ersim.errors import ConfigError, unknown_choice
from ersim.routing.features.base import Features, Joined
from ersim.routing.features.embedding import SentenceEmbedding
from ersim.routing.features.surface import Length, Surface
from ersim.routing.features.tfidf import TfidfSvd
from ersim.routing.own_code import imported

__all__ = [
    "FEATURES",
    "Features",
    "Joined",
    "Length",
    "SentenceEmbedding",
    "Surface",
    "TfidfSvd",
    "build_features",
]

FEATURES: Mapping[str, type[Features]] = {
    "tfidf": TfidfSvd,
    "embedding": SentenceEmbedding,
    "surface": Surface,
    "length": Length,
}


def build_features(spec: str, params: Mapping[str, Any] | None = None) -> Features:
    """Make the extractor for `spec`, such as ``tfidf`` or ``embedding+surface``.

    A part may also be the dotted path of a `Features` subclass of one's own, such as a local encoder.
    params: keyword arguments per part, e.g. ``{"tfidf": {"dims": 50}}``. ConfigError names an
    unknown part or argument.
    """
    params = params or {}
    parts = [part.strip() for part in spec.split("+")]
    classes = {part: _features_class(part) for part in [*parts, *params]}
    made = []
    for part in parts:
        try:
            made.append(classes[part](**params.get(part, {})))
        except TypeError as error:
            raise ConfigError(f"router.params.feature_params.{part}: {error}") from error
    return made[0] if len(made) == 1 else Joined(made)


def _features_class(part: str) -> type[Features]:
    """The class behind a name or a dotted path."""
    if part in FEATURES:
        return FEATURES[part]
    if "." not in part:
        raise unknown_choice("router.params.features", part, [*FEATURES, "package.module.Class"])
    found = imported(part, "router.params.features")
    if not (isinstance(found, type) and issubclass(found, Features)):
        raise ConfigError(f"router.params.features {part!r} must be a subclass of Features, got {found!r}")
    return found
