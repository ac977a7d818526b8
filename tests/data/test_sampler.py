"""The sampler against counts, brute-force rules and itself."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.config import RunConfig, SamplerSettings
from hybrid_scale.data.sampler import GlobalBatch, HybridSampler
from hybrid_scale.data.shuffle import draw, shuffled
from hybrid_scale.errors import ConfigError
from tests.data.synthetic import pairs_from, parallel

LANGUAGES = ("en", "de", "zh")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return parallel(tmp_path_factory.mktemp("pairs") / "train")


def settings_of(**changes) -> SamplerSettings:
    rows = changes.get("global_batch", 24)
    pool = rows if changes.get("composition") == "scheduled" else 6
    return SamplerSettings(**{"global_batch": rows, "pool_rows": pool, **changes})


def rows_by_pool(batch: GlobalBatch) -> list[tuple[str, np.ndarray, np.ndarray]]:
    spans = zip(batch.row_offsets[:-1], batch.row_offsets[1:], strict=True)
    return [(name, batch.query_rows[a:b], batch.passage_rows[a:b]) for name, (a, b) in zip(batch.pools, spans, strict=True)]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**32))
def test_shuffle_is_a_bijection(size, key):
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, [key])), np.arange(size))


def test_shuffle_looks_random():
    """Of 5,000 shuffles of 5 elements, each element stands first about equally often (chi-square, 4 degrees, p = 1e-6)."""
    first = Counter(int(shuffled(np.array([0]), 5, [key])[0]) for key in range(5_000))
    assert sum((first[i] - 1000) ** 2 / 1000 for i in range(5)) < 33.4


def test_draws_visit_everything_once_an_epoch():
    numbers = draw(np.arange(30), 10, [1])
    epochs = [numbers[:10].tolist(), numbers[10:20].tolist(), numbers[20:].tolist()]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("arm", ["mono", "cross", "hybrid", "mixed"])
@pytest.mark.parametrize("composition", ["composed", "scheduled"])
def test_batch_types_are_those_of_the_paper(data, arm, composition):
    sampler = HybridSampler(data, settings_of(arm=arm, composition=composition), seed=3)
    seen, several = set(), []
    for step in range(40):
        batch = sampler.batch(step)
        assert len(batch.query_rows) == 24
        assert batch.pools == batch.pools[:1] or composition == "composed"
        for name, queries, passages in rows_by_pool(batch):
            seen.add(name)
            query_lang, passage_lang = data.query_lang[queries], data.passage_lang[passages]
            assert np.array_equal(data.group[queries], data.group[passages])
            if name == "cross":
                assert (query_lang != passage_lang).all()
            elif name == "mixed":
                assert (query_lang == passage_lang).all()
                several.append(len(set(query_lang)) > 1)
            else:
                language = data.languages.index(name.removeprefix("mono:"))
                assert (query_lang == language).all()
                assert (passage_lang == language).all()
    expected = {
        "mono": {f"mono:{x}" for x in LANGUAGES},
        "cross": {"cross"},
        "hybrid": {"cross", *(f"mono:{x}" for x in LANGUAGES)},
        "mixed": {"mixed"},
    }
    assert seen == expected[arm]
    assert np.mean(several or [True]) > 0.95  # six rows of three languages are of one by chance in 0.4 % of pools


def test_composed_ratio_is_exact_in_every_batch(data):
    sampler = HybridSampler(data, settings_of(alpha=0.75), seed=0)
    for step in range(50):
        pools = rows_by_pool(sampler.batch(step))
        rows = Counter(name.partition(":")[0] for name, queries, _ in pools for _ in queries)
        assert rows == {"mono": 18, "cross": 6}
        assert [len(queries) for _, queries, _ in pools] == [6, 6, 6, 6]


def test_scheduled_quota_is_exact_in_every_window(data):
    sampler = HybridSampler(data, settings_of(composition="scheduled", alpha=0.3, window_steps=10), seed=0)
    kinds = [sampler.batch(step).pools[0].partition(":")[0] for step in range(100)]
    assert all(kinds[i : i + 10].count("mono") == 3 for i in range(0, 100, 10))
    assert len({tuple(kinds[i : i + 10]) for i in range(0, 100, 10)}) > 1


def test_scheduled_independent_draws_have_the_mean_of_the_paper(data):
    sampler = HybridSampler(data, settings_of(composition="scheduled", draws="independent", alpha=0.37, window_steps=7), seed=0)
    mono = sum(sampler.pools(step)[0][0] != "cross" for step in range(2000))
    assert abs(mono / 2000 - 0.37) < 0.05  # 4.6 standard deviations


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 300), seed=st.integers(0, 5), composition=st.sampled_from(["composed", "scheduled"]))
def test_a_batch_depends_on_the_step_alone(data, step, seed, composition):
    """Asked for directly, after others, or backwards: the same batch."""
    options = settings_of(composition=composition)
    one, other = HybridSampler(data, options, seed), HybridSampler(data, options, seed)
    for before in (step + 7, max(0, step - 3)):
        other.batch(before)
    a, b = one.batch(step), other.batch(step)
    assert a.pools == b.pools
    for name in ("query_rows", "passage_rows", "row_column", "column_text", "passages", "queries"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("composition", ["composed", "scheduled"])
def test_every_row_of_every_arm_meets_equally_many_negatives(tmp_path, composition, hard):
    """Counted column by column: all columns of a row's pool but those of its own family, which are no negatives of it."""
    data = parallel(tmp_path / "train", negatives=4)
    arms = [("mono", 0.5), ("cross", 0.5), ("mixed", 0.5), ("hybrid", 0.25), ("hybrid", 0.5), ("hybrid", 0.75)]
    counted = Counter()
    for arm, alpha in arms:
        chosen = settings_of(arm=arm, alpha=alpha, composition=composition, hard_negatives=hard)
        sampler = HybridSampler(data, chosen, seed=2)
        for step in range(10):
            batch = sampler.batch(step)
            assert set(np.diff(batch.row_offsets)) == {chosen.pool_rows}
            for pool, (start, end) in enumerate(pairwise(batch.row_offsets)):
                columns = slice(batch.column_offsets[pool], batch.column_offsets[pool + 1])
                drawn = batch.column_family[columns][~batch.column_is_hard[columns]]
                for row in range(start, end):
                    counted[int((drawn != batch.row_family[row]).sum())] += 1
    assert counted == {(24 if composition == "scheduled" else 6) - 1: 24 * 10 * len(arms)}


def test_negatives_a_row_are_those_of_the_loss(tmp_path):
    """What the config states is what the loss's own mask lets through, in-batch and with hard negatives alone."""
    data = parallel(tmp_path / "train", negatives=4)
    for hard in (0, 1, 3):
        for denominator in ("in_batch", "hard_only") if hard else ("in_batch",):
            config = RunConfig.model_validate(
                {
                    "data": {"train": "unread"},
                    "model": {"base": "unread"},
                    "training": {"max_steps": 1},
                    "loss": {"denominator": denominator},
                    "sampler": {"global_batch": 24, "pool_rows": 6, "hard_negatives": hard},
                }
            )
            batch = HybridSampler(data, config.sampler, seed=0).batch(3)
            held = Counter()
            for pool, (start, end) in enumerate(pairwise(batch.row_offsets)):
                columns = slice(batch.column_offsets[pool], batch.column_offsets[pool + 1])
                for row in range(start, end):
                    negative = np.ones(columns.stop - columns.start, bool)
                    negative[batch.row_column[row] - columns.start] = False
                    if denominator == "hard_only":
                        negative &= batch.column_is_hard[columns]
                    held[int(negative.sum())] += 1
            assert max(held) == config.negatives_a_row


@pytest.mark.parametrize("arm", ["mono", "cross", "hybrid", "mixed"])
def test_no_pool_holds_two_rows_of_a_family(tmp_path, arm):
    """Questions that share a passage, and groups of translations: neither meets in a pool."""
    rows = [(f"g{q}", f"p{q // 3}:{lang}", lang, lang) for q in range(240) for lang in LANGUAGES]
    data = pairs_from(rows, tmp_path / "train")
    sampler = HybridSampler(data, settings_of(arm=arm), seed=1)
    for step in range(60):
        batch = sampler.batch(step)
        for _, queries, passages in rows_by_pool(batch):
            assert len(set(data.family[queries])) == len(queries)
            assert len(set(data.passage[passages])) == len(passages)


def test_an_epoch_has_no_repetition_and_no_omission(data):
    sampler = HybridSampler(data, settings_of(arm="mono", composition="scheduled"), seed=1)
    stream = sampler.streams["mono:en"]
    epochs = 16  # 120 rows an epoch, dealt 16 pools x 24 rows at a time
    seen = np.concatenate([stream.pool(i)[0] for i in range(epochs * 5)])
    assert set(Counter(seen.tolist()).values()) == {epochs}
    deals = seen.reshape(-1, 16 * 24)
    for deal in deals:  # 384 consecutive draws touch at most 5 epochs, 2 of them whole
        assert set(Counter(deal.tolist()).values()) <= {2, 3, 4}


def test_cross_pairs_cover_every_ordered_pair(data):
    sampler = HybridSampler(data, settings_of(arm="cross"), seed=1)
    stream = sampler.streams["cross"]
    assert sum(s.size for s in stream.strata) == 120 * 6
    pools = [stream.pool(i) for i in range(720 // 6)]
    pairs = {(int(q), int(p)) for queries, passages in pools for q, p in zip(queries, passages, strict=True)}
    brute = {
        (q, p)
        for q in range(len(data))
        for p in range(len(data))
        if data.group[q] == data.group[p] and data.query_lang[q] != data.passage_lang[p]
    }
    assert pairs <= brute
    assert len(pairs) > 0.9 * len(brute)  # strata share a deal by rounding: the epoch's border may fall inside a pool


def test_allow_same_adds_the_equal_language_pairs(data):
    sampler = HybridSampler(data, settings_of(arm="cross", allow_same=True), seed=1)
    assert sum(s.size for s in sampler.streams["cross"].strata) == 120 * 9
    batches = [sampler.batch(step) for step in range(20)]
    same = [(data.query_lang[b.query_rows] == data.passage_lang[b.passage_rows]).mean() for b in batches]
    assert abs(np.mean(same) - 1 / 3) < 0.1


def test_partners_equal_brute_force_on_ragged_groups(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        (f"g{g}", f"g{g}:{i}:{lang}", lang, rng.choice(LANGUAGES))
        for g in range(40)
        for i, lang in enumerate(rng.choice(LANGUAGES, rng.integers(1, 5)))
    ]
    data = pairs_from(rows, tmp_path / "train")
    sampler = HybridSampler(data, settings_of(arm="cross", global_batch=2, pool_rows=1, conflicts="mask"), seed=0)
    found = set()
    for stratum in sampler.streams["cross"].strata:
        queries, passages = stratum.elements(np.arange(stratum.size))
        found |= set(zip(queries.tolist(), passages.tolist(), strict=True))
    assert found == {
        (q, p)
        for q in range(len(data))
        for p in range(len(data))
        if data.group[q] == data.group[p] and data.query_lang[q] != data.passage_lang[p]
    }


@pytest.mark.parametrize(
    ("weights", "expected"), [("uniform", [1 / 2, 1 / 2]), ("size", [4 / 5, 1 / 5]), ("power", [2 / 3, 1 / 3])]
)
def test_language_weights(tmp_path, weights, expected):
    rows = [(f"e{i}", f"e{i}", "en", "en") for i in range(400)] + [(f"d{i}", f"d{i}", "de", "de") for i in range(100)]
    data = pairs_from(rows, tmp_path / "train")
    sampler = HybridSampler(data, settings_of(arm="mono", language_weights=weights), seed=0)
    blocks = Counter(name for step in range(100) for name in sampler.batch(step).pools)
    total = sum(blocks.values())
    assert blocks["mono:en"] / total == pytest.approx(expected[0], abs=0.02)
    assert blocks["mono:de"] / total == pytest.approx(expected[1], abs=0.02)


def test_hard_negatives_are_columns_of_the_pool(tmp_path):
    data = parallel(tmp_path / "train", negatives=5)
    batch = HybridSampler(data, settings_of(hard_negatives=2), seed=0).batch(4)
    for row in range(24):
        negatives = set(
            data.negatives[data.negative_offsets[batch.passage_rows[row]] : data.negative_offsets[batch.passage_rows[row] + 1]]
        )
        pool = int(np.searchsorted(batch.row_offsets, row, side="right")) - 1
        columns = slice(batch.column_offsets[pool], batch.column_offsets[pool + 1])
        held = batch.passages[batch.column_text[columns] - len(batch.queries)]
        assert len(negatives & set(held[batch.column_is_hard[columns]].tolist())) == 2
        positive = batch.passages[batch.column_text[batch.row_column[row]] - len(batch.queries)]
        assert positive == data.passage[batch.passage_rows[row]]


def test_a_text_in_two_pools_is_embedded_once(data):
    """120 groups x 3 languages and 12 mono rows: over some steps a passage is in a mono and in a cross pool."""
    sampler = HybridSampler(data, settings_of(alpha=0.5), seed=0)
    batches = [sampler.batch(step) for step in range(30)]
    assert any(len(batch.passages) < len(batch.column_text) for batch in batches)
    for batch in batches:
        assert len(set(batch.passages.tolist())) == len(batch.passages)
        assert np.array_equal(
            batch.passages[batch.column_text[batch.row_column] - len(batch.queries)], data.passage[batch.passage_rows]
        )


# ------------------------------------------------------------------------------------ any configuration, any step


@st.composite
def configurations(draw_one) -> SamplerSettings:
    """Hybrid settings that the data (120 groups in 3 languages) can fill."""
    weights = draw_one(st.sampled_from(["uniform", "size", "power"]))
    draws = draw_one(st.sampled_from(["quota", "independent"]))
    languages = draw_one(st.sampled_from([(), ("zh", "en"), ("de", "zh")]))
    common = {"language_weights": weights, "draws": draws, "languages": languages}
    window = draw_one(st.integers(1, 12))
    if draw_one(st.booleans()):
        rows, mono, cross = draw_one(st.integers(1, 20)), draw_one(st.integers(0, 4)), draw_one(st.integers(1, 4))
        ratio = {"global_batch": rows * (mono + cross), "pool_rows": rows, "alpha": mono / (mono + cross)}
        return settings_of(**common, **ratio, window_steps=window)
    rows = draw_one(st.integers(1, 20))
    ratio = {"global_batch": rows, "pool_rows": rows, "alpha": draw_one(st.integers(0, window)) / window}
    return settings_of(**common, **ratio, composition="scheduled", window_steps=window)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(chosen=configurations(), first=st.integers(0, 200), seed=st.integers(0, 3))
def test_the_ratio_is_exact_from_any_step_on(data, chosen, first, seed):
    """A sampler that goes on at `first`, as after a resume, draws what one that started at 0 draws, in the ratio asked for."""
    start, steps = first - first % chosen.window_steps, 2 * chosen.window_steps
    goes_on, from_0 = HybridSampler(data, chosen, seed), HybridSampler(data, chosen, seed)
    from_0.pools(0)
    mono_steps = []
    for step in range(start, start + steps):
        mono = sum(len(queries) for name, queries, _ in rows_by_pool(from_0.batch(step)) if name != "cross")
        if chosen.composition == "composed":
            assert mono == round(chosen.alpha * chosen.global_batch)
        assert mono in (0, chosen.global_batch) or chosen.composition == "composed"
        mono_steps.append(mono > 0)
        if step >= first:
            a, b = goes_on.batch(step), from_0.batch(step)
            assert a.pools == b.pools
            assert np.array_equal(a.query_rows, b.query_rows)
            assert np.array_equal(a.passage_rows, b.passage_rows)
    if chosen.composition == "scheduled" and chosen.draws == "quota":
        quota = round(chosen.alpha * chosen.window_steps)
        assert [sum(mono_steps[: chosen.window_steps]), sum(mono_steps[chosen.window_steps :])] == [quota, quota]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(chosen=configurations(), deals=st.integers(1, 6), at=st.integers(0, 5))
def test_every_pair_is_drawn_equally_often_at_any_epochs_border(data, chosen, deals, at):
    """Of n draws from a stratum of s pairs each pair gets n // s of them or one more, after any number of deals."""
    for stream in HybridSampler(data, chosen, seed=at).streams.values():
        pools = [stream.pool(number) for number in range(deals * stream.pools_per_deal)]
        drawn = Counter((int(q), int(p)) for queries, passages in pools for q, p in zip(queries, passages, strict=True))
        assert sum(drawn.values()) == deals * stream.pools_per_deal * stream.pool_rows
        for stratum in stream.strata:
            queries, passages = stratum.elements(np.arange(stratum.size))
            counts = [drawn.pop((int(q), int(p)), 0) for q, p in zip(queries, passages, strict=True)]
            assert max(counts) - min(counts) <= 1
        assert not drawn


# -------------------------------------------------------------------------------------------------- refusals


def refusal(data, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        HybridSampler(data, settings_of(**changes), seed=0)
    return str(caught.value)


def test_refuses_a_pool_that_cant_be_filled(tmp_path):
    """30 questions on 5 passages: at most 5 rows of a pool can be of different passages."""
    data = pairs_from([(f"g{i}", f"p{i % 5}", "en", "en") for i in range(30)], tmp_path / "train")
    message = refusal(data, arm="mono")
    assert "pool 'mono:en' of 6 rows" in message
    assert "6 of 30 pairs" in message
    assert "at most 5 rows" in message
    assert "sampler.conflicts: mask" in message
    HybridSampler(data, settings_of(arm="mono", conflicts="mask"), seed=0).batch(0)


def test_refuses_a_language_without_pairs(tmp_path):
    rows = [(f"e{i}", f"e{i}", "en", "en") for i in range(60)] + [(f"x{i}", f"x{i}", "en", "de") for i in range(60)]
    data = pairs_from(rows, tmp_path / "train")
    message = refusal(data, arm="mono", languages=("en", "de"))
    assert "sampler.languages: found ['de']" in message
    assert "With pairs: en." in message


def test_refuses_an_unknown_language(data):
    assert "found 'fr'" in refusal(data, languages=("fr",))


def test_refuses_a_language_named_twice(data):
    assert "found 'en and en'; both name the language en" in refusal(data, languages=("en", "de", "en"))
    assert "found 'de and deu_Latn'; both name the language de" in refusal(data, languages=("en", "de", "deu_Latn"))


def test_refuses_cross_without_parallel_groups(tmp_path):
    data = pairs_from([(f"e{i}", f"e{i}", "en", "en") for i in range(60)], tmp_path / "train")
    assert "no group with passages in two languages" in refusal(data, arm="cross")


def test_refuses_too_few_hard_negatives(tmp_path):
    data = parallel(tmp_path / "train", negatives=1)
    assert "360 rows have fewer, the first is 'row0' with 1" in refusal(data, hard_negatives=2)  # 120 groups x 3, each once
