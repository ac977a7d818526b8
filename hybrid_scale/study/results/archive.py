"""A study's runs -> one small archive of what its report reads: to publish, and to go on from on another machine.

Of each run that has ended: config, manifest, status, logged steps and evaluations; no checkpoint, no vector, no text. Values
of single queries are kept as single precision, and averaged over the queries of a parallel question where no statistic can
tell (`by_question`). Unpacked into a study's directory, `launch/study.py report` writes the same report from it, and
`launch/study.py run` goes on with the runs that it lacks. Knows no statistic and no page.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, atomic_path
from hybrid_scale.study.grid import Plan
from hybrid_scale.study.jobs.state import read_status
from hybrid_scale.study.results.queries import CUTS, NAMES
from hybrid_scale.study.results.references import BASELINES

ENDED = ("done", "failed")
"""Status of a run that is put in: any other would need its checkpoint to go on."""
KEPT = ("config*.yaml", "manifest.json", "status.json", "metrics.jsonl", "eval/*.json", "eval/*.parquet")
"""Files of a run directory that the report reads."""
EVERY = "*"
"""Language of a row that stands for all languages of its question."""


def write_archive(plan: Plan, path: Path) -> list[str]:
    """Write `path` (a tar.xz, the same bytes for the same files); returns the ids of the runs in it.

    Raises RunError: no run has ended, a status or a table of single queries can't be read.
    """
    runs = [run for run in plan.runs if read_status(RunDirectory(run.directory))["status"] in ENDED]
    if not runs:
        raise RunError(describe(str(plan.directory), "no run that has ended", "an archive holds finished runs", "Run the study."))
    with atomic_path(path) as beside, tarfile.open(beside, "w:xz", preset=9) as archive:
        for name, file in sorted(_files(plan.directory, [run.directory for run in runs])):
            content = _compact(file) if file.suffix == ".parquet" else file.read_bytes()
            entry = tarfile.TarInfo(name)  # of no owner, no time: the bytes depend on the contents alone
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return [run.id for run in runs]


def _files(home: Path, runs: list[Path]) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file): names are relative to the study's directory."""
    for folder in runs:
        for pattern in KEPT:
            yield from ((file.relative_to(home).as_posix(), file) for file in folder.glob(pattern))
    for suffix in ("json", "parquet"):
        yield from ((file.relative_to(home).as_posix(), file) for file in (home / BASELINES).glob(f"*/eval/*.{suffix}"))


def _compact(file: Path) -> bytes:
    """A table of single queries with the columns that the report reads, by parallel question, in single precision."""
    try:
        table = parquet.read_table(file)
        parts = [name for name in ("part",) if name in table.column_names]
        measured = sorted({cut.column for cut in CUTS.values()} & set(table.column_names))
        frame = table.select([*NAMES, *parts, *measured]).to_pandas()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RunError(describe(str(file), error, "not a table of single queries", "Evaluate the run again.")) from None
    small = by_question(frame).astype(dict.fromkeys(measured, "float32"))
    sink = io.BytesIO()
    facts = pa.Table.from_pandas(small, preserve_index=False).replace_schema_metadata(table.schema.metadata)
    parquet.write_table(facts, sink, compression="zstd", compression_level=19)
    return sink.getvalue()


def by_question(table: pd.DataFrame) -> pd.DataFrame:
    """Rows averaged over the queries of each parallel question, apart for the union, the own and the other languages' pools.

    Every score is a mean over strata (languages, pairs of languages) of means over questions. Where each question has as many
    values in each stratum as any other, that is the mean over questions of their means, and questions are what intervals and
    tests resample: nothing changes. Rows where it isn't so (a question without a value, a set that comes in parts) stay.
    """
    if "part" in table:
        return table
    union, own = table["pool"] == "union", table["pool"] == table["query_lang"]
    kinds = (("union", union), (EVERY, own & ~union), ("other", ~own & ~union))
    return pd.concat([_averaged(table[rows], pool) for pool, rows in kinds if rows.any()], ignore_index=True)


def _averaged(rows: pd.DataFrame, pool: str) -> pd.DataFrame:
    """One row a question, `query` its group and `query_lang` EVERY; `rows` themselves where that would change a statistic."""
    measured = [name for name in rows if name not in NAMES]
    missing = rows[measured].isna()
    counts = rows.groupby(["group", "query_lang", "pool"]).size().unstack(["query_lang", "pool"], fill_value=0).to_numpy()
    equal = (counts == counts.flat[0]).all() and (missing.all() | ~missing.any()).all()
    if not equal or len(counts) == len(rows):
        return rows
    means = rows.groupby("group", sort=True)[measured].mean().reset_index()
    return means.assign(query=means["group"], query_lang=EVERY, pool=pool)[list(rows.columns)]
