"""A data set of the Hugging Face Hub, or a local folder in one of its formats: its configs, splits and rows.

`datasets` finds the files of a config and split. JSON, CSV, TSV and Parquet files are then read here, file by file: so text stays
text (`007`, `null` and dates too), shards may differ in their types, and a fault is named by file and line. Other formats are
streamed through `datasets`, whose types are then those of the publisher. Runs no remote code. Knows no record.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hybrid_scale.data.files import json_document, read_jsonl, read_table
from hybrid_scale.data.records import Bad
from hybrid_scale.data.sources.common import Row
from hybrid_scale.errors import DataError, describe

T = TypeVar("T")
TAB = "\t"
FORMATS = ("json", "csv", "parquet", "text")
"""Names of `datasets` for files of a format."""


class HubData:
    """One data set, and what its columns are called here.

    columns: ours -> theirs, or `=value` for a constant. strict: a table that lacks one of `theirs` is an error; else `unmet()`
    says which no table had. data_files: files for the formats `json`, `csv` and `parquet`.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None = None,
        revision: str = "",
        data_files: str = "",
        strict: bool = True,
    ):
        if not data_files and Path(path).is_file():
            path, data_files = "csv" if _stem_ends(path, ".csv", ".tsv") else "json", path
        if path in FORMATS and not data_files and not Path(path).is_dir():
            remedy = "Give --option data_files=FILE, or the file itself as --path."
            raise DataError(describe("hub: path", path, "this format needs files", remedy))
        self.path, self.columns, self.revision, self.data_files = path, dict(columns or {}), revision, data_files
        self.strict = strict
        self._met: set[str] = set()
        self._builders: dict[str, Any] = {}

    def configs(self) -> list[str]:
        """Names of its configs. Raises DataError where there is no such data set."""
        import datasets

        return self._asked(
            "",
            lambda: list(datasets.get_dataset_config_names(self.path, revision=self.revision or None, data_files=self._files())),
        )

    def splits(self, config: str) -> list[str]:
        """Names of the splits of a config."""
        import datasets

        builder = self._builder(config)
        if builder.config.data_files:
            return list(map(str, builder.config.data_files))
        return self._asked(
            config,
            lambda: list(
                datasets.get_dataset_split_names(
                    self.path, config or None, revision=self.revision or None, data_files=self._files()
                )
            ),
        )

    def split_of(self, config: str, *wanted: str) -> str:
        """The first wanted split that the config has, or its only split. Raises DataError where it has several others."""
        there = self.splits(config)
        chosen = next((name for name in wanted if name in there), there[0] if len(there) == 1 else None)
        if chosen is None:
            where, remedy = f"hub:{self.path}:{config or 'default'}", f"Known: {', '.join(there)}. Name one as --split."
            raise DataError(
                describe(f"{where}: split", wanted[0], "this config has several splits, and none of that name", remedy)
            )
        return chosen

    def rows(self, config: str, *splits: str, max_rows: int = 0) -> Iterator[Row | Bad]:
        """Rows of a config's split (see `split_of`) under our column names. max_rows: stop after so many; 0: never."""
        split = self.split_of(config, *splits)
        for number, (where, values) in enumerate(self._read(config, split)):
            if max_rows and number == max_rows:
                return
            yield values if isinstance(values, Bad) else Row(where, self._mapped(where, values))

    def numbered_rows(self, config: str, split: str, max_rows: int = 0) -> Iterator[Row | Bad]:
        """As `rows`; a row without `id` is named by its split and number, from 0."""
        for number, row in enumerate(self.rows(config, split, max_rows=max_rows)):
            yield row if isinstance(row, Bad) else Row(row.where, {"id": f"{split}:{number}", **row.values})

    def unmet(self) -> list[str]:
        """Columns of ours that no row was found to have."""
        return sorted(set(self.columns) - self._met)

    # -------------------------------------------------------------------------------------------------------- the library

    def _files(self) -> str | None:
        return self.data_files or None

    def _builder(self, config: str) -> Any:
        import datasets

        if config not in self._builders:
            self._builders[config] = self._asked(
                config,
                lambda: datasets.load_dataset_builder(
                    self.path, config or None, revision=self.revision or None, data_files=self._files()
                ),
            )
        return self._builders[config]

    def _asked(self, config: str, ask: Callable[[], T]) -> T:
        """What the library answers; whatever it raises, as a DataError of one line."""
        try:
            return ask()
        except Exception as error:
            raise self._fault(config, error) from error

    def _fault(self, config: str, error: Exception) -> DataError:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = "Check id, config, split, and that the Hub can be reached or the folder exists."
        return DataError(describe(f"hub:{self.path}:{config or 'default'}", found, "can't be opened", remedy))

    # --------------------------------------------------------------------------------------------------------------- rows

    def _read(self, config: str, split: str) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
        builder = self._builder(config)
        files = list((builder.config.data_files or {}).get(split, []))
        kind = type(builder.config).__name__
        reader = {"JsonConfig": _json, "ParquetConfig": _json, "CsvConfig": _table}.get(kind)
        if files and reader is not None:
            where = ""
            for file in files:
                for where, row in reader(str(file), builder.config):
                    yield where, row
            if not where:
                raise DataError(describe(", ".join(files), "no row", "these files must hold rows", "Fetch them again."))
            return
        yield from self._streamed(config, split)

    def _streamed(self, config: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = iter(self._asked(config, lambda: self._builder(config).as_streaming_dataset(split=split)))
        end: dict[str, Any] = {}
        number = 0
        while (values := self._asked(config, lambda: next(rows, end))) is not end:
            yield f"hub:{self.path}:{split}:{number}", values
            number += 1

    def _mapped(self, where: str, values: dict[str, Any]) -> dict[str, Any]:
        """The row under our names; unmapped columns keep theirs."""
        row = dict(values)
        for ours, theirs in self.columns.items():
            if theirs.startswith("="):
                row[ours] = theirs[1:]
            elif theirs in values:
                row[ours] = values[theirs]
            elif self.strict:
                raise DataError(describe(f"{where}: columns: {ours}", theirs, "no such column", f"Known: {', '.join(values)}."))
            else:
                continue
            self._met.add(ours)
        return row


def is_copy(path: str | Path) -> bool:
    """Whether it is a local copy of a data set of the Hub: a folder whose card (README.md) names configs."""
    card = Path(path) / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    return text.startswith("---\n") and "\nconfigs:" in text[: text.find("\n---", 3)]


def _json(file: str, config: Any) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """JSON Lines, a JSON list or Parquet; `field`: the key that holds the list."""
    field = getattr(config, "field", None)
    if field is None:
        return read_jsonl(file)
    tree = json_document(file)
    listed = tree.get(field) if isinstance(tree, dict) else None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise DataError(describe(f"{file}: {field}", type(listed).__name__, "must be a list of objects"))
    return ((f"{file}:{number}", row) for number, row in enumerate(listed, start=1))


def _table(file: str, config: Any) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """CSV or TSV; `names`: columns of a file without a header."""
    separator = TAB if config.sep == TAB or _stem_ends(file, ".tsv") else config.sep
    return read_table(file, separator, list(config.names) if config.names else None)


def _stem_ends(file: str, *endings: str) -> bool:
    """Whether the name ends in one of these, but for the ending of a compression."""
    name = file.lower()
    for packing in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(packing)
    return name.endswith(endings)
