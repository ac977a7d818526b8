"""Small prepared training sets for tests, from a table of (group, pid, query language, passage language)."""

from pathlib import Path

from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.records import Pair
from hybrid_scale.data.writing import write_pairs


def pairs_from(rows: list[tuple[str, str, str, str]], folder: Path, negatives: int = 0) -> Pairs:
    """One row each; texts are made from the ids, so that equal pids have equal texts."""
    records = [
        Pair(
            where=f"table:{i}",
            id=f"row{i}",
            group=group,
            pid=pid,
            query_lang=query_lang,
            passage_lang=passage_lang,
            query=f"question {i} about {group}",
            passage=f"text of {pid}" + " more" * (sum(pid.encode()) % 17),
            negatives=tuple((f"{pid}-neg{n}", f"wrong text {n} for {pid}") for n in range(negatives)),
        )
        for i, (group, pid, query_lang, passage_lang) in enumerate(rows)
    ]
    write_pairs(records, folder, {"name": "synthetic"})
    return Pairs(folder)


def parallel(folder: Path, groups: int = 120, languages: tuple[str, ...] = ("en", "de", "zh"), negatives: int = 0) -> Pairs:
    """Fully parallel data: every group in every language."""
    rows = [(f"g{g}", f"g{g}:{lang}", lang, lang) for g in range(groups) for lang in languages]
    return pairs_from(rows, folder, negatives)
