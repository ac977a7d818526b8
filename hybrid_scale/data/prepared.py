"""Prepared directories, opened memory-mapped: `Pairs` for training, `RetrievalSet` for evaluation.

Nothing is copied into memory; a directory that isn't whole is refused. Knows no source and no tokenizer.
Shapes: R rows, Q queries, P passages, J judgments.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hybrid_scale.errors import DataError, describe
from hybrid_scale.languages import distinct_codes
from hybrid_scale.runs import read_json

FORMAT = 1
AGAIN = "Prepare the data again (launch/prepare.py)."


class TextTable:
    """Text columns of an Arrow file, memory-mapped: rows are decoded when they are asked for."""

    def __init__(self, path: Path):
        try:
            with pa.memory_map(str(path)) as source:
                self.table = pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(describe(str(path), _reason(error), "a file of prepared data is needed", AGAIN)) from None

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str, rows: np.ndarray | None = None) -> list[str]:
        """Values of a column for the given row numbers, in their order; all of them when `rows` is None."""
        column = self.table.column(name)
        if rows is None:
            return column.to_pylist()
        if column.num_chunks == 1:
            return column.chunk(0).take(pa.array(rows, pa.int64())).to_pylist()
        return [column[int(row)].as_py() for row in rows]


class Pairs:
    """Training rows, ordered by group. Raises DataError: not a whole prepared directory of pairs."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.manifest = open_manifest(self.directory, "pairs")
        self.languages = codes_of(self.manifest["languages"], self.directory)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.queries = TextTable(self.directory / "queries.arrow")
        self.passages = TextTable(self.directory / "passages.arrow")
        self.query = self._array("query")
        """[R] number of the row's query in `queries`."""
        self.group = self._array("group")
        """[R] parallel group, non-decreasing."""
        self.passage = self._array("passage")
        """[R] number of the row's positive in `passages`."""
        self.query_lang = self._array("query_lang")
        """[R] number of the query's language in `languages`."""
        self.passage_lang = self._array("passage_lang")
        self.cross_only = self._array("cross_only")
        self.family = self._array("family")
        """[R] see `data.writing.families`."""
        self.passage_family = self._array("passage_family")
        """[P]"""
        self.negative_offsets = self._array("negative_offsets")
        """[R + 1] the row's hard negatives are negatives[offsets[r]:offsets[r + 1]]."""
        self.negatives = self._array("negatives")
        self.source_names: list[str] = self.manifest.get("source_names", [])
        self.source = self._array("source") if self.source_names else None
        """[R] number of the row's source in `source_names`; None: the set isn't a mix."""

    def _array(self, name: str) -> np.ndarray:
        return open_array(self.directory / f"{name}.npy")

    def __len__(self) -> int:
        return len(self.query)


class RetrievalSet:
    """A corpus, its queries and its judgments; numbers are positions in `corpus` and `queries`.

    Raises DataError: not a whole prepared retrieval set.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.name = self.directory.name
        self.manifest = open_manifest(self.directory, "retrieval")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.corpus = TextTable(self.directory / "corpus.arrow")
        self.queries = TextTable(self.directory / "queries.arrow")
        self.qrels = open_array(self.directory / "qrels.npy")
        """[J, 3] query, passage, score."""
        self.missing, self.missing_ids = self._missing()
        self.spellings: list[str] = self.manifest["languages"]
        """Its languages as the columns `lang` spell them: a set that an earlier version prepared may say `zho-Hans`."""
        self.languages = codes_of(self.spellings, self.directory)
        """The code of each (`hybrid_scale.languages`)."""

    def _missing(self) -> tuple[np.ndarray, list[str]]:
        """Judgments whose passage isn't in the corpus: query and score [M, 2], and the passages' ids.

        BEIR's ArguAna has some. Such a passage is never found, but it counts among the relevant ones of its query.
        """
        if not (self.directory / "missing.npy").is_file():
            return np.empty((0, 2), np.int64), []
        return open_array(self.directory / "missing.npy"), TextTable(self.directory / "missing.arrow").column("id")


def codes_of(spellings: list[str], directory: Path) -> list[str]:
    """The codes of a prepared directory's languages. Raises DataError: one without a code, two spellings of one language."""
    return distinct_codes(f"{directory}: languages", spellings, DataError, AGAIN)


def open_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """The manifest of a prepared directory of `kind`. Raises DataError, also where a file has gone or has another size."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise DataError(
            describe(str(directory), "no manifest.json", "not a prepared data directory", "Make one with launch/prepare.py.")
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "kind" not in manifest or "format" not in manifest:
        raise DataError(describe(str(path), "no kind or format", "not the manifest of a prepared data directory", AGAIN))
    if manifest["kind"] != kind:
        raise DataError(describe(str(directory), manifest["kind"], f"a prepared '{kind}' directory is needed here"))
    if manifest["format"] != FORMAT:
        raise DataError(
            describe(str(directory), manifest["format"], f"this version reads format {FORMAT}", "Prepare the data again.")
        )
    missing = [key for key in ("languages", "fingerprint") if key not in manifest]
    if missing:
        raise DataError(describe(str(path), "no " + " and no ".join(missing), "a manifest has them", AGAIN))
    _check_sizes(directory, manifest.get("bytes", {}))
    return manifest


def _check_sizes(directory: Path, sizes: dict[str, int]) -> None:
    """`sizes`: bytes of each data file as it was written; data of earlier versions doesn't say."""
    for name, size in sizes.items():
        path = directory / name
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            found = "no such file" if held is None else f"{held:,} bytes"
            raise DataError(describe(str(path), found, f"the manifest says {size:,} bytes", AGAIN))


def open_array(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped. Raises DataError."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(describe(str(path), _reason(error), "a file of prepared data is needed", AGAIN)) from None
    return array


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.partition("\n")[0]


def data_files(directory: Path) -> list[Path]:
    """The files that hold a prepared directory's content; the manifest and what is derived later aren't among them."""
    return sorted(path for path in directory.iterdir() if path.suffix in (".arrow", ".npy"))


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of the data files of a prepared directory."""
    total = hashlib.sha256()
    for path in data_files(directory):
        with open(path, "rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
