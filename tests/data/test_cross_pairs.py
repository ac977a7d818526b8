"""Cross pairs that several rows or parallel groups give: each is drawn as one, checked against brute force and by hand."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.config import SamplerSettings
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.records import Pair
from hybrid_scale.data.sampler import HybridSampler
from hybrid_scale.data.strata import CrossStratum, open_strata
from hybrid_scale.data.summary import by_source, cross_pairs
from hybrid_scale.data.writing import write_pairs

Row = tuple[str, str, str, str, str, bool]
"""Group, query language, query, passage language, passage, cross only."""


def prepared(rows: list[Row], folder: Path, sources: tuple[str, ...] = ("",)) -> Pairs:
    """Row i is of source i modulo their number."""
    records = [
        Pair(f"row {i}", str(i), group, text, lang, passage_lang, query, text, cross_only=only, source=sources[i % len(sources)])
        for i, (group, lang, query, passage_lang, text, only) in enumerate(rows)
    ]
    write_pairs(records, folder, {"name": "test"})
    return Pairs(folder)


def texts(data: Pairs, queries: np.ndarray, passages: np.ndarray) -> list[tuple[str, str]]:
    asked, answered = data.queries.column("text", data.query[queries]), data.passages.column("text", data.passage[passages])
    return list(zip(asked, answered, strict=True))


def candidates(data: Pairs, language: str, languages: tuple[str, ...], same: bool) -> list[tuple[int, int]]:
    """Every (query row, passage row) that the rules allow, repetitions too, in the order of the rows."""
    named = [(data.languages[q], data.languages[p]) for q, p in zip(data.query_lang, data.passage_lang, strict=True)]
    return [
        (q, p)
        for q in range(len(data))
        for p in range(len(data))
        if data.group[q] == data.group[p]
        and named[q][0] == language
        and named[p][1] in languages
        and (not (data.cross_only[q] and q == p) if same else named[q][0] != named[p][1])
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("gh"),
            st.sampled_from(["en", "de", "ha"]),
            st.sampled_from(["who", "wer"]),
            st.sampled_from(["en", "de", "ha"]),
            st.sampled_from("pqr"),
            st.booleans(),
        ),
        min_size=1,
        max_size=9,
    ),
    same=st.booleans(),
    languages=st.sampled_from([("en", "de", "ha"), ("ha", "en")]),
)
def test_each_pair_counts_once(rows: list[Row], same: bool, languages: tuple[str, ...]) -> None:
    """Equal queries in one group and in two, one text under two languages, copies of sentences, copies of rows."""
    with TemporaryDirectory() as place:
        data = prepared(rows, Path(place) / "pairs")
        chosen = tuple(language for language in languages if language in data.languages)
        strata = {stratum.language: stratum for stratum in open_strata(data, "cross", chosen, same)} if chosen else {}
        for language in chosen:
            allowed = candidates(data, language, chosen, same)
            wanted = set(texts(data, *np.array(allowed or np.empty((0, 2), int)).T))
            assert (language in strata) == bool(wanted)
            if not wanted:
                continue
            stratum = strata[language]
            queries, passages = stratum.elements(np.arange(stratum.size))
            found = list(zip(queries.tolist(), passages.tolist(), strict=True))
            assert set(found) <= set(allowed)
            assert Counter(texts(data, queries, passages)) == Counter(wanted)
            families = int(data.passage_family.max()) + 1
            counts = np.bincount(data.family[queries], minlength=families)
            assert np.array_equal(stratum.family_counts(data.family, families), counts)
            # A row that gives the pair itself stands for its repetitions.
            given_by_a_row = set(texts(data, *np.array([(q, p) for q, p in allowed if q == p] or np.empty((0, 2), int)).T))
            for (q, p), pair in zip(found, texts(data, queries, passages), strict=True):
                assert (q == p) == (pair in given_by_a_row)
            if len(allowed) == len(wanted):  # without repetitions the order is that of the rows, as it always was
                assert found == allowed
        if languages[0] == "en" and not same:
            assert cross_pairs(data) == sum(stratum.size for stratum in strata.values())


def afriqa(groups: int) -> list[Row]:
    """A question in Hausa and in English, both given as rows with the same English passage, tied by a parallel group."""
    hausa = [(f"g{n}", "ha", f"tambaya {n}", "en", f"passage {n}", False) for n in range(groups)]
    return hausa + [(f"g{n}", "en", f"question {n}", "en", f"passage {n}", False) for n in range(groups)]


def test_rows_that_also_follow_from_their_group(tmp_path: Path) -> None:
    """AfriQA's shape: 120 groups are 120 cross pairs, 5 steps of 24; both rows' copies of the passage would make them 240."""
    data = prepared(afriqa(120), tmp_path / "train")
    chosen = SamplerSettings(arm="cross", global_batch=24, pool_rows=12)
    sampler = HybridSampler(data, chosen, seed=2)
    assert cross_pairs(data) == 120
    assert sampler.repetitions == 120
    assert sampler.describe()["pools"] == {"cross": "12 rows of 120 pairs"}
    assert sampler.describe()["steps per epoch of each stream"] == {"cross": 5.0}
    stream = sampler.streams["cross"]
    pools = [stream.pool(number) for number in range(5 * stream.pools_per_deal)]  # 80 pools of 12 rows: 8 epochs
    drawn = Counter(pair for queries, passages in pools for pair in texts(data, queries, passages))
    assert drawn == {(f"tambaya {n}", f"passage {n}"): 8 for n in range(120)}
    resumed = HybridSampler(data, chosen, seed=2, deals=sampler.deals).batch(7)
    assert np.array_equal(resumed.query_rows, sampler.batch(7).query_rows)
    assert np.array_equal(resumed.query_rows, resumed.passage_rows), "the row's own hard negatives are the question's"


def test_a_pair_of_two_sources_counts_for_one(tmp_path: Path) -> None:
    """Sources a and b hold the same question with the same passage in groups of their own; b has one more question."""
    rows = [("a", "ha", "wane", "en", "it", False), ("b", "ha", "wane", "en", "it", False)]
    rows += [("c", "en", "who", "en", "other", False), ("d", "ha", "me", "en", "other", False)]
    data = prepared(rows, tmp_path / "train", ("a", "b"))
    assert {name: facts["cross_pairs"] for name, facts in by_source(data).items()} == {"a": 1, "b": 1}
    assert cross_pairs(data) == 2


def test_blocks_of_an_index_leave_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared([*afriqa(30), *afriqa(20)[:20]], tmp_path / "whole")
    (whole,) = open_strata(data, "cross", (), False)
    monkeypatch.setattr("hybrid_scale.data.strata.BLOCK", 3)
    (pieces,) = open_strata(prepared([*afriqa(30), *afriqa(20)[:20]], tmp_path / "pieces"), "cross", (), False)
    assert isinstance(whole, CrossStratum)
    assert isinstance(pieces, CrossStratum)
    assert whole.size == pieces.size == 30
    assert np.array_equal(whole.gaps, pieces.gaps)
