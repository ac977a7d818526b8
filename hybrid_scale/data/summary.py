"""A prepared directory in a few lines of text: sizes, languages, language pairs.

Reads the manifest, the small arrays and the language columns. Cross pairs are counted by the index that the sampler draws
from, which is made here where it is missing.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.strata import CrossStratum, open_strata
from hybrid_scale.runs import read_json

MOST_LINES = 40


def summarize(directory: Path) -> str:
    """The manifest's numbers, then rows per language pair (training) or judged queries per language pair (retrieval)."""
    manifest = read_json(directory / "manifest.json")
    numbers = [(key, value) for key, value in manifest.items() if isinstance(value, int) and key != "format"]
    kind, languages, fingerprint = manifest["kind"], manifest["languages"], manifest["fingerprint"]
    lines = [f"{directory}: {kind}, {len(languages)} languages, fingerprint {fingerprint[:12]}"]
    lines += [f"  {key.replace('_', ' '):32} {value:>12,}" for key, value in numbers]
    lines += spelling_lines(manifest.get("language_codes", {}))
    lines += [f"  note: {note}." for note in manifest.get("notes", [])]
    lines += source_lines(Pairs(directory)) if manifest.get("source_names") else []
    lines += pair_lines(Pairs(directory)) if kind == "pairs" else retrieval_lines(RetrievalSet(directory))
    return "\n".join(lines)


def spelling_lines(codes: dict[str, dict[str, int]]) -> list[str]:
    """A line for each language that the data spell otherwise than we do. `codes`: code -> spelling -> texts."""
    lines = []
    for code, spellings in codes.items():
        listed = ", ".join(f"{spelling} ({count:,} texts)" for spelling, count in spellings.items())
        lines.append(f"  one language, other codes: {code} is written {listed}")
    return lines


def pair_lines(pairs: Pairs) -> list[str]:
    """Rows per (query language, passage language), and how many ordered cross pairs the rows and their groups give."""
    named = zip(np.asarray(pairs.query_lang).tolist(), np.asarray(pairs.passage_lang).tolist(), strict=True)
    rows = Counter((pairs.languages[query], pairs.languages[passage]) for query, passage in named)
    lines = [f"  {'rows marked cross only':32} {int(np.sum(pairs.cross_only)):>12,}"]
    lines += [f"  {'hard negatives':32} {len(pairs.negatives):>12,}"]
    lines += [f"  {'cross pairs within groups':32} {cross_pairs(pairs):>12,}", "  rows per query and passage language"]
    counted = rows.most_common(MOST_LINES)
    lines += [f"    {f'{query} -> {passage}':30} {count:>12,}" for (query, passage), count in counted]
    rest = len(rows) - len(counted)
    return [*lines, f"    and {rest} more language pairs"] if rest else lines


def by_source(pairs: Pairs) -> dict[str, dict[str, int]]:
    """Of each source of a mix: its rows, languages, parallel groups, hard negatives, and ordered cross pairs within groups.

    A cross pair that several sources give counts for one of them.
    """
    if pairs.source is None:
        return {}
    found = {}
    crossed = _cross_pairs_of_rows(pairs)
    for number, name in enumerate(pairs.source_names):
        rows = np.asarray(pairs.source) == number
        found[name] = {
            "rows": int(rows.sum()),
            "languages": len(np.unique(np.concatenate([pairs.query_lang[rows], pairs.passage_lang[rows]]))),
            "groups": len(np.unique(pairs.group[rows])),
            "hard_negatives": int(np.diff(pairs.negative_offsets)[rows].sum()),
            "cross_pairs": int(crossed[rows].sum()),
        }
    return found


def source_lines(pairs: Pairs) -> list[str]:
    """A line for each source of a mix, with its licence."""
    licences = pairs.manifest.get("mix", {}).get("sources", {})
    lines = [f"  {'source':20} {'rows':>12} {'languages':>10} {'groups':>12} {'cross pairs':>14} {'hard negatives':>15}  licence"]
    for name, one in by_source(pairs).items():
        numbers = f"{one['rows']:>12,} {one['languages']:>10} {one['groups']:>12,} {one['cross_pairs']:>14,}"
        licence = licences.get(name, {}).get("licence", "not stated")
        lines.append(f"  {name:20} {numbers} {one['hard_negatives']:>15,}  {licence}")
    return lines


def cross_pairs(pairs: Pairs) -> int:
    """Ordered pairs of a query and a passage of one group in two languages, each once."""
    return int(_cross_pairs_of_rows(pairs).sum())


def _cross_pairs_of_rows(pairs: Pairs) -> np.ndarray:
    """[R] cross pairs that the row's query is drawn with. A pair that several rows give counts at one of them."""
    counts = np.zeros(len(pairs), np.int64)
    for stratum in open_strata(pairs, "cross", (), allow_same=False):
        assert isinstance(stratum, CrossStratum)
        counts[stratum.rows] = stratum.counts
    return counts


def retrieval_lines(data: RetrievalSet) -> list[str]:
    """Per language: passages, queries, and of these the queries with a relevant passage in each corpus language."""
    languages = data.languages
    code = {lang: number for number, lang in enumerate(data.spellings)}
    passage_lang = np.asarray([code[lang] for lang in data.corpus.column("lang")])
    query_lang = np.asarray([code[lang] for lang in data.queries.column("lang")])
    passages = np.bincount(passage_lang, minlength=len(languages))
    queries = np.bincount(query_lang, minlength=len(languages))
    table = answered(data, query_lang, passage_lang, len(languages))
    lines = [f"  {'language':10} {'passages':>12} {'queries':>9} {'answered in own language':>26}"]
    for number, lang in enumerate(languages):
        lines.append(f"  {lang:10} {passages[number]:>12,} {queries[number]:>9,} {table[number, number]:>26,}")
    return lines + _cross_lines(languages, queries, table)


def answered(data: RetrievalSet, query_lang: np.ndarray, passage_lang: np.ndarray, languages: int) -> np.ndarray:
    """[L, L] queries in language row that have a relevant passage in language column."""
    relevant = np.asarray(data.qrels)[np.asarray(data.qrels)[:, 2] > 0]
    seen = np.unique(relevant[:, 0] * languages + passage_lang[relevant[:, 1]])
    table = np.zeros((languages, languages), np.int64)
    np.add.at(table, (query_lang[seen // languages], seen % languages), 1)
    return table


def _cross_lines(languages: Sequence[str], queries: np.ndarray, table: np.ndarray) -> list[str]:
    """Nothing for a monolingual set; one line when every query is answered everywhere; else the table."""
    if not (table - np.diag(np.diag(table))).any():
        return []
    if (table == queries[:, None]).all():
        return ["  every query has a relevant passage in every language"]
    lines = ["  queries with a relevant passage in (row: query language, column: corpus language); the others are skipped there"]
    lines.append("  " + " " * 6 + "".join(f"{lang:>8}" for lang in languages))
    for lang, row in zip(languages, table.tolist(), strict=True):
        lines.append(f"  {lang:6}" + "".join(f"{count:>8,}" for count in row))
    return lines
