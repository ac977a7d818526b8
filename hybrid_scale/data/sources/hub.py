"""Any data set of the Hugging Face Hub, or a local folder in one of its formats, streamed through `datasets`.

Columns are mapped by name; `=value` is a constant. Refuses remote code: `datasets` 4 and later runs none, and none is asked for.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hybrid_scale.data.records import Judgment, Query, Record
from hybrid_scale.data.sources import beir
from hybrid_scale.data.sources.common import Converter, Languages, Row, convert, judgment
from hybrid_scale.data.sources.pairs import wanted_pair
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
    qrels: str = "",
    max_rows: int = 0,
) -> Iterator[Record]:
    """Records of the data set `path` (an id or a folder; `json`, `csv` or `parquet` with `data_files`).

    kind `pairs`: fields as in `sources.pairs`, id defaults to `<split>:<row>`, split to `train`.
    kind `retrieval`: configs `corpus` and `queries` with splits of the same names, and judgments in the default config
    (as mteb does) or in the data set `qrels` (as BeIR does), split `test`; only judged queries are kept.
    columns: ours -> theirs, {"query": "question", "query_lang": "=en"}. lang: language of rows that name none.
    max_rows: stop a training set after so many rows; 0: none.
    """
    if kind not in ("pairs", "retrieval"):
        raise DataError(describe("kind", kind, "must be pairs or retrieval"))
    source = HubData(path, columns or {}, revision, data_files)
    wanted = Languages(languages)
    if kind == "pairs":
        yield from source.records(config, split or "train", lambda row: wanted_pair(row, wanted, lang), max_rows)
        wanted.check(f"hub:{path}")
        return
    table = HubData(qrels, {}, "", "") if qrels else HubData(path, {}, revision, "")
    judgments = list(table.records("", split or "test", judgment))
    judged = {record.query for record in judgments if isinstance(record, Judgment)}
    left_out = beir.LeftOut()
    yield from source.records("corpus", "corpus", lambda row: left_out.unless_wanted(beir.passage(row, lang), wanted))
    for record in source.records("queries", "queries", lambda row: left_out.unless_wanted(beir.query(row, lang), wanted)):
        if not isinstance(record, Query) or record.id in judged:
            yield record
    wanted.check(f"hub:{path}")
    yield from (record for record in judgments if not left_out.concerns(record))


class HubData:
    """One data set of the Hub, or a local folder in one of its formats, and its column names."""

    def __init__(self, path: str, columns: Mapping[str, str], revision: str, data_files: str):
        self.path, self.columns, self.revision, self.data_files = path, columns, revision, data_files

    def records(
        self, config: str, split: str, converter: Converter, max_rows: int = 0, any_split: bool = False
    ) -> Iterator[Record]:
        """Converted rows of one config and split; `any_split`: of its only split where it lacks the one asked for."""
        for row in self.rows(config, split, max_rows, any_split):
            record = convert(row, converter)
            if record is not None:
                yield record

    def rows(self, config: str, split: str, max_rows: int = 0, any_split: bool = False) -> Iterator[Row]:
        """Rows under our column names; `id` is their place where they have none."""
        for number, values in enumerate(self._stream(config, split, any_split)):
            if max_rows and number == max_rows:
                return
            where = f"hub:{self.path}:{split}:{number}"
            yield Row(where, {"id": f"{split}:{number}", **self._mapped(where, values)})

    def _stream(self, config: str, split: str, any_split: bool) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            if any_split:
                names = datasets.get_dataset_split_names(self.path, config, revision=self.revision or None)
                split = str(names[0]) if len(names) == 1 else split
            yield from datasets.load_dataset(
                self.path,
                config or None,
                split=split,
                streaming=True,
                revision=self.revision or None,
                data_files=self.data_files or None,
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            found = f"{type(error).__name__}: {error}"
            where = f"hub:{self.path}:{config or 'default'}:{split}"
            remedy = "Check id, config, split, and that the Hub can be reached or the folder exists."
            raise DataError(describe(where, found, "can't be opened", remedy)) from error

    def _mapped(self, where: str, values: dict[str, Any]) -> dict[str, Any]:
        """The row under our names; unmapped columns keep theirs. Raises DataError when a mapped column doesn't exist."""
        row = dict(values)
        for ours, theirs in self.columns.items():
            if theirs.startswith("="):
                row[ours] = theirs[1:]
            elif theirs in values:
                row[ours] = values[theirs]
            else:
                raise DataError(describe(f"{where}: columns: {ours}", theirs, "no such column", f"Known: {', '.join(values)}."))
        return row
