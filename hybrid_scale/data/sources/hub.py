"""Any data set of the Hugging Face Hub, or a local folder in one of its formats, as training rows or as a retrieval set.

Columns are mapped by name; `=value` is a constant. How files are read: hub_data.py; layouts of retrieval sets: hub_retrieval.py.
"""

from collections.abc import Iterator, Mapping

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources import hub_languages, hub_retrieval
from hybrid_scale.data.sources.common import Languages, Splits, converted, require_languages
from hybrid_scale.data.sources.hub_data import HubData
from hybrid_scale.data.sources.pairs import wanted_pairs
from hybrid_scale.errors import DataError, describe


def read(
    path: str,
    split: str = "",
    kind: str = "pairs",
    columns: Mapping[str, str] | None = None,
    config: str = "",
    languages: tuple[str, ...] = (),
    lang: str = "en",
    revision: str = "",
    data_files: str = "",
    queries: str = "",
    qrels: str = "",
    max_rows: int = 0,
) -> Iterator[Record]:
    """Records of the data set `path` (an id or a folder; `json`, `csv` or `parquet` with `data_files`).

    kind `pairs`: fields as in `sources.pairs`, id defaults to `<split>:<row>`, split to `train`.
    kind `retrieval`: the layouts of `sources.hub_retrieval`, split `test`; only judged queries are kept. `config` names one part
    of a set in parts; `queries` and `qrels` name data sets that hold these apart from the corpus. Where the parts are languages,
    those of `languages` are read, and ids become `<language>:<id>`.
    columns: ours -> theirs, {"query": "question", "query_lang": "=en"}. lang: language of rows that name none.
    max_rows: stop a training set after so many rows; 0: none.
    """
    if kind not in ("pairs", "retrieval"):
        raise DataError(describe("kind", kind, "must be pairs or retrieval"))
    wanted, config = Languages(languages), "" if config == "default" and kind == "retrieval" else config
    if kind == "pairs":
        rows = HubData(path, columns, revision, data_files).numbered_rows(config, split or "train", max_rows)
        splits = Splits("", "--split names a split of the data set, not a value of this column")
        yield from converted(splits.kept(rows), lambda row: wanted_pairs(row, wanted, lang))
        yield from splits.check(f"hub:{path}")
        wanted.check(f"hub:{path}")
        return
    source = HubData(path, columns, revision, data_files, strict=False)
    parts = [] if config or queries or "corpus" in source.configs() else hub_retrieval.parts(source)
    if parts and languages:
        names = require_languages(f"hub:{path}", languages, parts)
        yield from hub_languages.read(path, {name: name for name in names}, split or "test", revision)
        return
    if parts:
        remedy = f"Known: {', '.join(parts)}. Give one as --option config=NAME, or --languages where they are languages."
        raise DataError(describe(f"hub:{path}", f"{len(parts)} parts", "a set in parts needs the name of one", remedy))
    others = [HubData(name, columns, strict=False) if name else None for name in (queries, qrels)]
    yield from hub_retrieval.Tables(source, others[0], others[1], config, split or "test").read(wanted, lang)
    wanted.check(f"hub:{path}")
    unmet = set.intersection(*(set(data.unmet()) for data in (source, *others) if data is not None))
    if unmet:
        name = min(unmet)
        raise DataError(describe(f"hub:{path}: columns: {name}", (columns or {})[name], "no table has this column"))
