"""The measures against pytrec_eval, ir_measures and numbers worked by hand."""

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from ir_measures import AP, RR, P, R, nDCG

from hybrid_scale.retrieval.metrics import RelevantRanks, average_precision, mean, ndcg, recall, reciprocal_rank, success

POOL = 60


def random_ranks(grades: bool) -> RelevantRanks:
    """40 queries, 0 to 8 relevant passages each, some of them not retrieved."""
    rng = np.random.default_rng(11)
    query, rank = [], []
    for q in range(40):
        count = int(rng.integers(0, 9))
        places = rng.choice(POOL, count, replace=False) + 1.0
        query += [q] * count
        rank += [place if place <= 50 else np.inf for place in places]
    grade = rng.integers(1, 5, len(query)) if grades else None
    return RelevantRanks(np.array(query), np.array(rank), 40, grade)


def as_trec(relevant: RelevantRanks) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Judgments and a run of 50 results with score = -rank."""
    qrels: dict[str, dict[str, int]] = {}
    run = {f"q{q}": {f"other{r}": -float(r) for r in range(1, 51)} for q in range(relevant.queries)}
    for j, (q, rank, grade) in enumerate(zip(relevant.query, relevant.rank, relevant.grade, strict=True)):
        qrels.setdefault(f"q{q}", {})[f"rel{j}"] = int(grade)
        if np.isfinite(rank):
            del run[f"q{q}"][f"other{int(rank)}"]
            run[f"q{q}"][f"rel{j}"] = -float(rank)
    return qrels, run


@pytest.mark.parametrize("grades", [False, True])
def test_every_measure_equals_pytrec_eval(grades: bool) -> None:
    relevant = random_ranks(grades)
    qrels, run = as_trec(relevant)
    names = {"map", "recip_rank", "recall.5,20,100", "success.1,5,10", "ndcg_cut.1,5,10,100"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    ours = {"map": average_precision(relevant), "recip_rank": reciprocal_rank(relevant)}
    ours |= {f"recall_{k}": recall(relevant, k) for k in (5, 20, 100)}
    ours |= {f"success_{k}": success(relevant, k) for k in (1, 5, 10)}
    ours |= {f"ndcg_cut_{k}": ndcg(relevant, k) for k in (1, 5, 10, 100)}
    for name, values in ours.items():
        for q in range(relevant.queries):
            if f"q{q}" in qrels:
                assert values[q] == pytest.approx(theirs[f"q{q}"][name], abs=1e-14), (name, q)
            else:
                assert np.isnan(values[q])


def test_means_equal_ir_measures() -> None:
    relevant = random_ranks(grades=False)
    qrels, run = as_trec(relevant)
    theirs = ir_measures.calc_aggregate([AP, RR @ 10, R @ 20, P @ 1, nDCG @ 10], qrels, run)
    ours = {AP: average_precision(relevant), RR @ 10: reciprocal_rank(relevant, 10), R @ 20: recall(relevant, 20)}
    ours |= {P @ 1: success(relevant, 1), nDCG @ 10: ndcg(relevant, 10)}
    for measure, values in ours.items():
        assert mean(values) == pytest.approx(theirs[measure], abs=1e-12), measure


def test_numbers_worked_by_hand() -> None:
    relevant = RelevantRanks(np.array([1, 0, 0, 0]), np.array([4, np.inf, 5, 2]), 3, np.array([1, 2, 3, 1]))
    assert average_precision(relevant)[:2].tolist() == [(1 / 2 + 2 / 5) / 3, 1 / 4]
    assert reciprocal_rank(relevant)[:2].tolist() == [1 / 2, 1 / 4]
    assert reciprocal_rank(relevant, 3)[:2].tolist() == [1 / 2, 0]
    assert recall(relevant, 4)[:2].tolist() == [1 / 3, 1]
    assert success(relevant, 2)[:2].tolist() == [1, 0]
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert ndcg(relevant, 10)[0] == pytest.approx((1 / np.log2(3) + 3 / np.log2(6)) / ideal)
    assert mean(recall(relevant, 4)) == pytest.approx(2 / 3)  # the third query has no relevant passage: left out


def test_nothing_relevant_at_all() -> None:
    none = RelevantRanks(np.zeros(0, np.int64), np.zeros(0), 2)
    for values in (average_precision(none), reciprocal_rank(none), recall(none, 1), success(none, 1), ndcg(none, 1)):
        assert np.isnan(values).all()
        assert np.isnan(mean(values))


@pytest.mark.parametrize(("rank", "grade"), [(0, 1), (np.nan, 1), (1, 0)])
def test_impossible_ranks_and_grades_are_refused(rank: float, grade: int) -> None:
    with pytest.raises(ValueError, match="one rank from 1"):
        RelevantRanks(np.array([0]), np.array([rank]), 1, np.array([grade]))
