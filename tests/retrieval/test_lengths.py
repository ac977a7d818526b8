"""Evaluation cuts texts at lengths of its own: what is cut, counted, refused, kept apart and told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_scale.config import EVALUATION_TOKENS, EvaluationSettings
from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.errors import ModelError
from hybrid_scale.planning.architecture import longest_text
from hybrid_scale.protocols import BEIR
from hybrid_scale.retrieval.lengths import UNCUT, at_limit, at_limit_in, budget_of, cut_warning, lengths_note, text_lengths
from hybrid_scale.retrieval.parts import mean_of
from hybrid_scale.retrieval.store import make_store
from hybrid_scale.train.run import _is_scored
from tests.study.results.test_set_protocols import notes, result, study
from tests.train.setup import make_config, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("lengths"))


def test_the_cut_is_the_evaluations_and_the_trainings_stays(folder: Path) -> None:
    """A text of 100 words: cut at 32 and 64 in training, whole in evaluation."""
    training = load_text_encoder(make_config(folder))
    evaluation = for_evaluation(training, EvaluationSettings())
    text = ["g1 " * 100]
    (whole,) = evaluation.encode("query", text)
    assert len(whole) > 100
    assert whole[-1] == evaluation.end
    assert [len(training.encode(role, text)[0]) for role in ("query", "passage")] == [32, 64]
    assert whole[:31] == training.encode("query", text)[0][:31]
    assert evaluation.digest != training.digest, "tables of token lengths are kept apart"


@pytest.mark.parametrize(("longest", "most"), [(None, EVALUATION_TOKENS), (80, 80), (4096, EVALUATION_TOKENS)])
def test_the_default_is_512_or_what_the_base_takes(folder: Path, longest: int | None, most: int) -> None:
    encoder = replace(load_text_encoder(make_config(folder)), longest=longest)
    assert for_evaluation(encoder, EvaluationSettings()).max_tokens == {"query": most, "passage": most}
    stated = EvaluationSettings(max_query_tokens=48, max_passage_tokens=96)
    assert for_evaluation(encoder, stated).max_tokens == {"query": 48, "passage": 96}


@pytest.mark.parametrize(
    ("shape", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            },
            4096,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2048),
        ({"max_position_embeddings": 8192, "rope_parameters": {"full": {"rope_type": "yarn"}}}, 8192),
    ],
)
def test_the_longest_text_of_a_base(shape: dict[str, Any], longest: int | None) -> None:
    assert longest_text(shape) == longest


def test_no_room_beside_the_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"evaluation\.max_query_tokens: found 8; prompt, begin and end tokens alone take 8"):
        for_evaluation(load_text_encoder(make_config(folder)), EvaluationSettings(max_query_tokens=8))


def test_texts_at_the_limit_are_counted(folder: Path, tmp_path: Path) -> None:
    """Of lengths 13, 16, 15, 16 two are at the limit of 16; a store knows it from its parts, unless one was never counted."""
    encoder = for_evaluation(load_text_encoder(make_config(folder)), EvaluationSettings(max_passage_tokens=16))
    assert at_limit(np.array([13, 16, 15, 16]), encoder, "passage") == 2
    assert budget_of(encoder, 128) == EVALUATION_TOKENS, "one text must fit"
    store = make_store(tmp_path, {"dtype": "float32"}, 4, 2, 2)
    store.write(0, np.ones((2, 2), np.float32), str, at_limit=1)
    store.write(1, np.ones((2, 2), np.float32), str, at_limit=1)
    assert at_limit_in(store) == 2
    said = lengths_note(text_lengths(encoder, 0, at_limit_in(store)))
    assert said == "texts cut at 512 (queries) and 16 (passages) tokens: 0 queries and 2 passages are that long"
    store.write(1, np.ones((2, 2), np.float32), str)
    assert at_limit_in(store) is None
    assert lengths_note(text_lengths(encoder, 0, None)) == "texts cut at 512 (queries) and 16 (passages) tokens"


def test_a_set_in_parts_adds_its_counts(folder: Path) -> None:
    encoder = for_evaluation(load_text_encoder(make_config(folder)), EvaluationSettings())
    parts = [
        {"task": name, "fingerprint": name, "languages": ["en"], "metrics": {}, "text_lengths": text_lengths(encoder, *counts)}
        for name, counts in (("a", (1, 20)), ("b", (2, None)))
    ]
    assert mean_of("whole", parts)["text_lengths"] == text_lengths(encoder, 3, None)
    unknown = [parts[0], parts[1] | {"text_lengths": None}]
    assert mean_of("whole", unknown)["text_lengths"] is None
    other = [parts[0], parts[1] | {"text_lengths": {**text_lengths(encoder, 0, 0), "max_query_tokens": 64}}]
    assert mean_of("whole", other)["text_lengths"] is None


def test_a_warning_has_counts_and_shares() -> None:
    """3 of 12 queries, 1 of 8 passages; none where nothing is at the limit or the lengths aren't known."""
    counts = {"max_query_tokens": 64, "max_passage_tokens": 256, "queries_at_limit": 3, "passages_at_limit": 1}
    result = {"task": "x", "queries": 12, "passages": 8, "text_lengths": counts}
    said = (
        "warning: x: texts cut at 64 (queries) and 256 (passages) tokens: 3 queries (25.0%) and 1 passages (12.5%) are that long"
    )
    assert cut_warning(result) == said
    for lengths in (UNCUT, None, counts | {"queries_at_limit": 0, "passages_at_limit": 0}):
        assert cut_warning(result | {"text_lengths": lengths}) is None


def test_a_result_of_other_lengths_is_none_of_the_run(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    file.write_text('{"text_lengths": {"max_query_tokens": 32, "max_passage_tokens": 512}}')
    other = ({}, {"max_query_tokens": 33}, {"max_query_tokens": 32, "max_passage_tokens": 64})
    for stated, scored in (({"max_query_tokens": 32}, True), *((one, False) for one in other)):
        assert _is_scored(file, make_config(folder, evaluation=stated)) is scored, stated
    file.write_text("{}")
    assert not _is_scored(file, make_config(folder)), "an older version cut where the training does"
    assert not _is_scored(tmp_path / "other.json", make_config(folder))


def test_runs_scored_at_other_lengths_arent_compared(tmp_path: Path) -> None:
    cut = {"mono": (512, 512), "cross": (512, 512), "hybrid": (64, 256)}
    results = {
        arm: result("x", BEIR, languages=("en",)) | {"text_lengths": {"max_query_tokens": query, "max_passage_tokens": passage}}
        for arm, (query, passage) in cut.items()
    }
    _, collected = study(tmp_path, results)
    assert "found 'cut 64/256'; runs are compared at one length of texts" in notes(collected, "hybrid")
    counted = collected.values[collected.values["doubt"].isna()]
    assert set(counted["cut"]) == {"512/512"}
