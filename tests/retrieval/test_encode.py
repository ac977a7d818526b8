"""Encoding to a store: what ranks share out, what a kill leaves, what is encoded again and what is refused.

The model is a table of random vectors, summed over a text's tokens: it gives a text the same vector in any micro-batch.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybrid_scale import dist
from hybrid_scale.config import RunConfig, validate
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.text import TextEncoder, make_text_encoder
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval import encode as module
from hybrid_scale.retrieval.encode import Embed, Encoding, encode_stored
from hybrid_scale.retrieval.store import open_store
from hybrid_scale.retrieval.stored import StoredVectors
from hybrid_scale.retrieval.vectors import open_embeddings, open_stored
from tests.ranks import RanksFailed, run_ranks
from tests.retrieval.worlds import rounded

PASSAGES, WORDS, DIMENSIONS = 1100, 40, 5
TABLE = torch.randn(WORDS + 2, DIMENSIONS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def write_task(directory: Path, changed: str = "") -> RetrievalSet:
    rng = np.random.default_rng(2)
    words = lambda: " ".join(f"w{word}" for word in rng.integers(0, WORDS, rng.integers(1, 12)))  # noqa: E731
    records: list[Record] = [Passage("t", f"p{at}", "en", words()) for at in range(PASSAGES)]
    records += [Query("t", f"q{at}", "en", words() + changed, f"q{at}") for at in range(9)]
    records += [Judgment("t", f"q{at}", f"p{at}", 1) for at in range(9)]
    write_retrieval(records, directory, {"name": "test"})
    return RetrievalSet(directory)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalSet:
    return write_task(tmp_path_factory.mktemp("encode") / "set")


def text_encoder(prompt: str = "w1 ", padded: bool = False) -> TextEncoder:
    words = {f"w{number}": number + 2 for number in range(WORDS)} | {"<end>": 0, "<unknown>": 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = validate(
        RunConfig,
        {
            "data": {"train": "none", "max_passage_tokens": 10},
            "model": {"base": "none", "passage_prompt": prompt, "attention_implementation": "sdpa" if padded else "packed"},
            "training": {"max_steps": 1},
        },
        "test",
    )
    return make_text_encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), config)


def embed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "lengths" in batch:
        rows = list(batch["input_ids"][0].split(batch["lengths"].tolist()))
    else:
        rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    sums = torch.stack([TABLE[row].sum(0) for row in rows])
    return torch.nn.functional.normalize(sums, dim=-1).float()


def encoding(using: Embed = embed, model: str = "m", padded: bool = False, dtype: str = "float16") -> Encoding:
    return Encoding({"base": model}, text_encoder(padded=padded), using, 64, dtype)


def expected(task: RetrievalSet) -> np.ndarray:
    """One text at a time, as float16."""
    encoder = text_encoder()
    one = [embed(encoder.collate(encoder.encode("passage", [text]))) for text in task.corpus.column("text")]
    return rounded(torch.cat(one).numpy(), "float16")


def stored(directory: Path) -> np.ndarray:
    store = open_store(directory)
    return StoredVectors(store, 0, store.rows, float("inf"))[:]


def stamps(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("part_*")}


# -------------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("padded", [False, True])
def test_stored_vectors_are_those_of_single_texts(task: RetrievalSet, tmp_path: Path, padded: bool) -> None:
    store = encode_stored(task, "passage", tmp_path, encoding(padded=padded))
    np.testing.assert_array_equal(stored(tmp_path), expected(task))
    assert (store.parts, store.part_rows, store.dtype) == (16, 69, "float16")
    assert store.identity["prompt"] == "w1 "
    assert store.identity["texts"] != encode_stored(task, "query", tmp_path / "q", encoding()).identity["texts"]


def test_a_second_time_embeds_nothing_and_a_missing_part_alone(task: RetrievalSet, tmp_path: Path) -> None:
    encode_stored(task, "passage", tmp_path, encoding())
    before, texts = stamps(tmp_path), []

    def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        texts.append(len(batch["lengths"]))
        return embed(batch)

    encode_stored(task, "passage", tmp_path, encoding(counted))
    assert texts == []
    assert stamps(tmp_path) == before
    open_store(tmp_path).record_file(4).unlink()
    encode_stored(task, "passage", tmp_path, encoding(counted))
    assert sum(texts) == 69
    assert {name for name, stamp in stamps(tmp_path).items() if before[name] != stamp} == {"part_00004.npy", "part_00004.json"}


def test_a_damaged_part_is_encoded_again_with_a_warning(
    task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_stored(task, "passage", tmp_path, encoding())
    path = tmp_path / "part_00002.npy"
    path.write_bytes(path.read_bytes()[:300])
    corpus = open_store(tmp_path)
    with pytest.raises(DataError, match=r"part_00002\.npy has 300 bytes for 69 vectors: truncated"):
        open_stored(encode_stored(task, "query", tmp_path / "queries", encoding()), corpus, task)
    capsys.readouterr()
    encode_stored(task, "passage", tmp_path, encoding())
    assert "warning: " in (said := capsys.readouterr().err)
    assert "part_00002.npy has 300 bytes for 69 vectors: truncated or not what was written; part 2 is encoded again" in said
    np.testing.assert_array_equal(stored(tmp_path), expected(task))


def test_another_model_prompt_or_corpus_is_refused(task: RetrievalSet, tmp_path: Path) -> None:
    encode_stored(task, "passage", tmp_path / "store", encoding())
    before = stamps(tmp_path / "store")
    with pytest.raises(DataError, match=r"model\.base: 'm' -> 'n'"):
        encode_stored(task, "passage", tmp_path / "store", encoding(model="n"))
    other = Encoding({"base": "m"}, text_encoder("w2 "), embed, 64)
    with pytest.raises(DataError, match="prompt: 'w1 ' -> 'w2 '"):
        encode_stored(task, "passage", tmp_path / "store", other)
    with pytest.raises(DataError, match="dtype: 'float16' -> 'float32'"):
        encode_stored(task, "passage", tmp_path / "store", encoding(dtype="float32"))
    wider = lambda batch: torch.cat([embed(batch)] * 2, dim=1)  # noqa: E731
    open_store(tmp_path / "store").record_file(1).unlink()
    with pytest.raises(DataError, match="vectors of 5 dimensions were expected"):
        encode_stored(task, "passage", tmp_path / "store", encoding(wider))
    del before["part_00001.json"]
    assert stamps(tmp_path / "store") == before


def test_vectors_of_other_texts_are_refused(task: RetrievalSet, tmp_path: Path) -> None:
    for role, kind in (("query", "queries"), ("passage", "corpus")):
        encode_stored(task, role, tmp_path / "store" / kind, encoding())  # type: ignore[arg-type]
    queries, shard = open_embeddings(tmp_path / "store", task)
    assert (queries.shape, len(shard), queries.dtype) == ((9, DIMENSIONS), PASSAGES, np.float32)
    other = write_task(tmp_path / "other", changed=" w0")
    with pytest.raises(DataError, match=r"queries: these are embeddings of something else: texts: "):
        open_embeddings(tmp_path / "store", other)


def test_no_room_on_the_disk_is_said_before_the_work(task: RetrievalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="room on the disk"):
        encode_stored(task, "passage", tmp_path, encoding())
    assert not stamps(tmp_path)


def test_progress_is_said_with_rate_and_time_left(
    task: RetrievalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PROGRESS_SECONDS", -1.0)
    encode_stored(task, "passage", tmp_path, encoding())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 16
    assert lines[-1].startswith("encoding passages: 1100/1100  ")
    assert lines[-1].endswith(" passages/s  left 0 s")


# ----------------------------------------------------------------------------------------------------------------- ranks


def with_one_slow_rank(data: Path, directory: Path) -> tuple[int, list[str]]:
    """Texts that this rank embedded, and the ids of its half of the store. Rank 1 stands still in its first piece until rank 0
    has done 950 texts, and rank 0 doesn't begin before it."""
    dist.start()
    task, texts = RetrievalSet(data), [0]
    begun, most_done = directory / "begun", directory / "most_done"

    def uneven(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        texts[0] += len(batch["lengths"])
        if texts[0] > 1:  # the first text of each rank gives the dimensions
            if dist.rank() == 1:
                begun.touch()
            elif texts[0] > 950:
                most_done.touch()
            wait_for(begun if dist.rank() == 0 else most_done)
        return embed(batch)

    store = encode_stored(task, "passage", directory / "corpus", encoding(uneven))
    queries = encode_stored(task, "query", directory / "queries", encoding())
    _, shard = open_stored(queries, store, task, checked=True)
    return texts[0] - 1, [str(number) for number in shard.numbers]


def wait_for(path: Path) -> None:
    while not path.exists():  # the run of the ranks has a limit
        time.sleep(0.001)


def test_a_slow_rank_takes_less_and_shares_stay_equal(task: RetrievalSet, tmp_path: Path) -> None:
    results = run_ranks(with_one_slow_rank, 2, task.directory, tmp_path)
    np.testing.assert_array_equal(stored(tmp_path / "corpus"), expected(task))
    counts = [count for count, _ in results]
    assert sum(counts) == PASSAGES
    assert counts[0] > 3 * counts[1] > 0
    assert [len(numbers) for _, numbers in results] == [550, 550]


def killed_after(data: Path, directory: Path, texts: int) -> None:
    dist.start()
    left = [texts]

    def deadly(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        left[0] -= len(batch["lengths"])
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed(batch)

    encode_stored(RetrievalSet(data), "passage", directory, encoding(deadly))


def test_a_killed_run_goes_on_where_it_was(task: RetrievalSet, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="died without a word, exit code -9"):
        run_ranks(killed_after, 2, task.directory, tmp_path, 250, patience=1)
    before = stamps(tmp_path)
    assert 2 <= len(before) < 2 * 32
    encode_stored(task, "passage", tmp_path, encoding())  # on one rank
    after = stamps(tmp_path)
    assert all(after[name] == before[name] for name in before if name.replace(".npy", ".json") in before)
    np.testing.assert_array_equal(stored(tmp_path), expected(task))


def broken_on_one_rank(data: Path, directory: Path, spoil: Callable[[torch.Tensor], torch.Tensor]) -> str:
    dist.start()
    seen = [0]

    def sometimes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen[0] += 1
        return spoil(embed(batch)) if dist.rank() == 1 and seen[0] == 3 else embed(batch)

    try:
        encode_stored(RetrievalSet(data), "passage", directory, encoding(sometimes))
    except DataError as error:
        return str(error)
    return "no error"


def with_nan(vectors: torch.Tensor) -> torch.Tensor:
    vectors[0, 2] = torch.nan
    return vectors


def narrower(vectors: torch.Tensor) -> torch.Tensor:
    return vectors[:, :1]


def test_nan_and_other_dimensions_end_all_ranks_with_the_reason(task: RetrievalSet, tmp_path: Path) -> None:
    messages: list[Any] = run_ranks(broken_on_one_rank, 2, task.directory, tmp_path / "a", with_nan)
    assert messages[0] == messages[1]
    assert "1 vectors (id 'p" in messages[0]
    assert "NaN or infinity" in messages[0]
    messages = run_ranks(broken_on_one_rank, 2, task.directory, tmp_path / "b", narrower)
    assert messages[0] == messages[1]
    assert "vectors of 5 dimensions were expected" in messages[0]
    encode_stored(task, "passage", tmp_path / "a", encoding())
    np.testing.assert_array_equal(stored(tmp_path / "a"), expected(task))
