"""Prompt sets: the built-in one, files in three formats, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ersim.config import PromptSetConfig
from ersim.errors import ConfigError, DataError
from ersim.workload import PromptSet, estimate_tokens, load_prompt_set

ROWS = pd.DataFrame(
    {
        "prompt": ["What is 2 + 2?", "Name a river, please", "Why?"],
        "domain": ["math", "geography", None],
        "big": [1.0, 0.5, 1.0],
        "small": [True, False, False],
        "tokens": [8, 5, 2],
    }
)


def write(table: pd.DataFrame, path: Path) -> str:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False)
    return str(path)


def test_built_in_set_is_large_diverse_and_clean() -> None:
    built_in = load_prompt_set(PromptSetConfig())
    texts = [prompt.text for prompt in built_in.prompts]
    counts = pd.Series([prompt.domain for prompt in built_in.prompts]).value_counts()
    assert len(texts) >= 600 and len(set(texts)) == len(texts)
    assert len(counts) == 12 and counts.min() >= 50
    assert len({prompt.prompt_id for prompt in built_in.prompts}) == len(texts)
    assert all(text == text.strip() for text in texts)
    assert built_in.models == []  # nobody has graded answers to these


def test_built_in_lengths_have_a_tail() -> None:
    """One-liners and pasted documents: the longest twentieth holds ten times the median's tokens or more."""
    tokens = load_prompt_set(PromptSetConfig()).own_tokens
    assert np.quantile(tokens, 0.05) <= 15
    assert np.quantile(tokens, 0.97) >= 7 * np.median(tokens)


def test_built_in_domains_can_be_clustered_but_not_trivially() -> None:
    """tf-idf, SVD and k-means find far more than chance (1/12) and far less than everything."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    built_in = load_prompt_set(PromptSetConfig())
    domains = np.array([prompt.domain for prompt in built_in.prompts])
    matrix = TfidfVectorizer(stop_words="english", min_df=2, sublinear_tf=True).fit_transform(
        prompt.text for prompt in built_in.prompts
    )
    points = normalize(TruncatedSVD(20, random_state=0).fit_transform(matrix))
    clusters = KMeans(24, n_init=1, random_state=0).fit_predict(points)
    pure = sum(pd.Series(domains[clusters == cluster]).value_counts().iloc[0] for cluster in set(clusters))
    assert 0.35 < pure / len(domains) < 0.9


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "parquet"])
def test_formats_load_alike(tmp_path: Path, ending: str) -> None:
    config = PromptSetConfig(
        path=write(ROWS, tmp_path / f"set.{ending}"),
        prompt_tokens_column="tokens",
        quality_columns={"large": "big", "tiny": "small"},
    )
    loaded = load_prompt_set(config)
    assert [prompt.text for prompt in loaded.prompts] == list(ROWS.prompt)
    assert loaded.domains == ["geography", "math", "unknown"]
    assert loaded.models == ["large", "tiny"]
    assert loaded.prompts[1].quality == {"large": 0.5, "tiny": 0.0}
    assert loaded.own_tokens.tolist() == [8, 5, 2]
    reference = load_prompt_set(
        PromptSetConfig(
            path=write(ROWS, tmp_path / "reference.parquet"),
            prompt_tokens_column="tokens",
            quality_columns={"large": "big", "tiny": "small"},
        )
    )
    assert loaded.digest == reference.digest


def test_digest_sees_every_field() -> None:
    built_in = load_prompt_set(PromptSetConfig(limit=5))
    assert len(built_in.digest) == 64
    assert built_in.digest != load_prompt_set(PromptSetConfig(limit=4)).digest
    assert built_in.digest == PromptSet("another name", list(built_in.prompts)).digest


def test_bench_jsonl_brings_its_answer_lengths(tmp_path: Path) -> None:
    """The custom data set format of vllm bench serve: {"prompt": ..., "output_tokens": ...}."""
    path = tmp_path / "custom.jsonl"
    path.write_text(
        '{"prompt": "hello", "output_tokens": 12}\n{"prompt": "2019-05-01", "output_tokens": 7}\n'
    )
    loaded = load_prompt_set(PromptSetConfig(path=str(path), domain_column=None))
    assert [prompt.output_tokens for prompt in loaded.prompts] == [12, 7]
    assert loaded.prompts[1].text == "2019-05-01"
    assert loaded.domains == ["unknown"]


def test_missing_scores_and_counts_stay_missing(tmp_path: Path) -> None:
    table = ROWS.assign(big=[None, 0.5, 1.0], tokens=[8, None, 2])
    loaded = load_prompt_set(
        PromptSetConfig(
            path=write(table, tmp_path / "set.csv"),
            prompt_tokens_column="tokens",
            quality_columns={"large": "big"},
        )
    )
    assert loaded.prompts[0].quality == {}
    assert [prompt.prompt_tokens for prompt in loaded.prompts] == [8, None, 2]
    assert loaded.own_tokens[1] == estimate_tokens(ROWS.prompt[1])


def test_router_quality_sets_load(shared_data: Path) -> None:
    two = load_prompt_set(
        PromptSetConfig(
            path=str(shared_data / "router-quality" / "routellm_mmlu_gsm8k.parquet"),
            id_column="id",
            quality_columns={"strong": "strong_correct", "weak": "weak_correct"},
        )
    )
    assert len(two.prompts) == 15_361 and len(two.domains) == 58
    assert two.models == ["strong", "weak"]
    nine = load_prompt_set(
        PromptSetConfig(
            path=str(shared_data / "router-quality" / "llmrouter_9models_scores.parquet"),
            domain_column="task",
            quality_columns={"*": "score__*"},
        )
    )
    assert len(nine.prompts) == 6_108 and len(nine.models) == 9
    assert "llama-3.1-8b-instruct" in nine.models


def test_estimate_counts_bytes() -> None:
    assert estimate_tokens("") == 1
    assert estimate_tokens("a" * 394) == 100
    assert estimate_tokens("日本語" * 10) > estimate_tokens("abc" * 10)
    assert estimate_tokens("\ud800") == 1  # half a surrogate pair, as broken exports hold them


def bad(tmp_path: Path, table: pd.DataFrame, **config: object) -> None:
    load_prompt_set(PromptSetConfig(path=write(table, tmp_path / "bad.csv"), **config))  # type: ignore[arg-type]


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"workload.prompts.path: no such file: nowhere.csv"):
        load_prompt_set(PromptSetConfig(path="nowhere.csv"))


def test_wrong_file_type(tmp_path: Path) -> None:
    path = tmp_path / "set.xlsx"
    path.write_text("x")
    with pytest.raises(DataError, match=r"must end in one of: .parquet, .csv"):
        load_prompt_set(PromptSetConfig(path=str(path)))


@pytest.mark.parametrize("name", ["set.parquet", "set.jsonl"])
def test_content_that_is_not_what_the_name_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("prompt,domain\nhello,x\n")
    with pytest.raises(DataError, match=f"{name} cannot be read as"):
        load_prompt_set(PromptSetConfig(path=str(path)))


def test_missing_column_lists_those_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'question'.*text_column.*prompt, domain, big"):
        bad(tmp_path, ROWS, text_column="question")
    with pytest.raises(DataError, match=r"no column 'topic'.*null means"):
        bad(tmp_path, ROWS, domain_column="topic")
    with pytest.raises(DataError, match=r"no column 'gpt'.*quality_columns.m"):
        bad(tmp_path, ROWS, quality_columns={"m": "gpt"})
    with pytest.raises(DataError, match=r"no column 'score__\*'"):
        bad(tmp_path, ROWS, quality_columns={"*": "score__*"})


def test_empty_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no rows"):
        bad(tmp_path, ROWS.iloc[:0])
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"cannot be read as csv"):
        load_prompt_set(PromptSetConfig(path=str(tmp_path / "empty.csv")))


@pytest.mark.parametrize("count", [0, -3, 2.5, "many"])
def test_token_counts_that_are_none(tmp_path: Path, count: object) -> None:
    table = ROWS.assign(tokens=[8, count, 2])
    with pytest.raises(DataError, match=r"row 2: tokens must be a whole number >= 1, got"):
        bad(tmp_path, table, prompt_tokens_column="tokens")


@pytest.mark.parametrize("score", [1.2, -0.1, "good"])
def test_scores_out_of_range(tmp_path: Path, score: object) -> None:
    with pytest.raises(DataError, match=r"row 3: big must be a finite number in \[0, 1\]"):
        bad(tmp_path, ROWS.assign(big=[1, 0, score]), quality_columns={"m": "big"})


def test_empty_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: prompt must be a non-empty text"):
        bad(tmp_path, ROWS.assign(prompt=["a", "  ", "b"]))


def test_texts_that_look_missing_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("prompt,domain\nNA,x\nNone,x\nnull,\n")
    loaded = load_prompt_set(PromptSetConfig(path=str(path)))
    assert [prompt.text for prompt in loaded.prompts] == ["NA", "None", "null"]
    assert loaded.prompts[2].domain == "unknown"


def test_limit() -> None:
    assert len(load_prompt_set(PromptSetConfig(limit=7)).prompts) == 7
    with pytest.raises(ConfigError, match=r"workload.prompts.limit must be >= 1, got 0"):
        load_prompt_set(PromptSetConfig(limit=0))
