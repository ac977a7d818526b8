"""Raw files: told by their first bytes, unpacked or named; lines, JSON and CSV with the text as it stands."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hybrid_scale.data.files import either, read_jsonl, read_lines, read_table
from hybrid_scale.data.records import Bad
from hybrid_scale.data.sources.common import json_rows, tsv_rows
from hybrid_scale.errors import DataError


def packed(name: str, data: bytes, folder: Path) -> Path:
    """`data` in a file without the ending of its compression."""
    path = folder / "rows.jsonl"
    if name == "zstd":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "plain": bytes}[name](data))
    return path


@pytest.mark.parametrize("name", ["plain", "gzip", "bz2", "xz", "zstd"])
def test_compression_is_told_by_content(name: str, tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": f"é {n * 7919}"} for n in range(5000)]
    data = b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = packed(name, data, tmp_path)
    assert [row for _, row in read_jsonl(path)] == rows
    if name == "plain":
        return
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^[^\n]*rows\.jsonl: found .*; damaged \w+\. Fetch the file again\.$"):
        list(read_jsonl(path))
    path.write_bytes(whole[:40] + b"\xff" * 200 + whole[240:])
    with pytest.raises(DataError, match=r"^[^\n]*rows\.jsonl.*(damaged|must be UTF-8)[^\n]*$"):
        list(read_jsonl(path))


def archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("a.jsonl", "{}\n")
    else:
        with tarfile.open(fileobj=sink, mode="w:gz" if kind == "tar.gz" else "w") as file:
            file.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO(b""))
    return sink.getvalue()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "found 'a Git LFS pointer'; a text file is needed. It stands for the file: get that with `git lfs pull`"),
        (b"\n<!DOCTYPE HTML>\n<p>401", "found 'a web page'; a text file is needed. The download gave an answer"),
        (archive("zip"), "found 'a zip archive'; a text file is needed. Unpack or convert it."),
        (archive("tar"), "found 'a tar archive'; a text file is needed"),
        (archive("tar.gz"), "found 'a tar archive within gzip'; a text file is needed"),
        (gzip.compress(gzip.compress(b"{}")), "found 'gzip within gzip'"),
        (b"SQLite format 3\x00" + bytes(99), "found 'an SQLite database'"),
        (b"\x93NUMPY\x01\x00", "found 'a NumPy array'"),
    ],
    # Names of our own: those made of the bytes would hold an archive's time, which differs between the workers of pytest-xdist.
    ids=["lfs-pointer", "web-page", "zip", "tar", "tar-in-gzip", "gzip-in-gzip", "sqlite", "numpy"],
)
def test_what_is_no_text_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(data)
    for read in (read_jsonl, read_lines, read_table):
        with pytest.raises(DataError) as error:
            list(read(path))
        assert str(error.value).startswith(f"{path}: {message}")
        assert "\n" not in str(error.value)


def test_parquet_is_read_as_rows_and_named_where_lines_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    columns = {"id": [7, 8], "text": ["a", None], "emb": [[0.5], [1.5]], "pos": [[{"docid": "1"}], []]}
    parquet.write_table(pa.table(columns), path)
    expected = [{"id": 7, "text": "a", "pos": [{"docid": "1"}]}, {"id": 8, "text": None, "pos": []}]
    assert list(read_jsonl(path)) == [(f"{path} (Parquet):{n}", row) for n, row in enumerate(expected, start=1)]
    with pytest.raises(DataError, match=r"rows: found 'Parquet'; a text file is needed\. Convert it"):
        list(read_lines(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"rows: found .*; damaged Parquet\. Fetch the file again\.$"):
        list(read_jsonl(path))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")).filter(str.strip), max_size=6))
def test_lines_end_at_line_feeds_alone(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.tsv"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    expected = [line.removeprefix("\ufeff" * (n == 0)).removesuffix("\r") for n, line in enumerate(lines)]
    assert [line for _, line in read_lines(path)] == [line for line in expected if line.strip()]


def test_a_line_keeps_its_carriage_returns_and_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes("1\ta\rb\x0bc\x85d\u2028e\r\n2\t\rx\n3\ta\tb\n".encode())
    one, two, three = tsv_rows(path, ("id", "text"))
    assert [row.values["text"] for row in (one, two)] == ["a\rb\x0bc\x85d\u2028e", "\rx"]  # type: ignore[union-attr]
    assert isinstance(three, Bad)
    assert three.message.startswith(f"{path}:3: found '3\\ta\\tb'; a row has 2 columns (id text), not 3")


def test_json_in_one_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "007"}, 3, {"id": "2020-01-01"}], indent=1))
    first, bad, last = read_jsonl(path)
    assert (first, last) == ((f"{path}:1", {"id": "007"}), (f"{path}:3", {"id": "2020-01-01"}))
    assert isinstance(bad[1], Bad)
    path.write_text('[{"id": "a"},\n')
    ((_, bad_line),) = read_jsonl(path)
    assert isinstance(bad_line, Bad)
    assert bad_line.message.startswith(f'{path}:1: found \'[{{"id": "a"}},\'; not JSON')


def test_tables_keep_their_text(tmp_path: Path) -> None:
    """Ids with zeros, words that libraries take for nothing, dates, truth values, numbers, quotes, breaks."""
    cells = ["007", "null", "NA", "nan", "2020-01-01", "True", "1e5", "1.10", "-", "None", " x ", "1_000"]
    path = tmp_path / "rows.csv"
    path.write_text("id,text,empty\n" + "".join(f"{cell},{cell},\n" for cell in cells))
    assert [row for _, row in read_table(path)] == [{"id": cell, "text": cell, "empty": None} for cell in cells]
    path.write_bytes(b'id,text\r\n1,"a, ""b""\nc\rd"\r\n\r\n2,"e"x\r\n3,f\rg\r\n4\r\n5,h\r\n')
    rows = list(read_table(path))
    good = {where: row for where, row in rows if isinstance(row, dict)}
    assert good == {f"{path}:2": {"id": "1", "text": 'a, "b"\nc\rd'}, f"{path}:8": {"id": "5", "text": "h"}}
    bad = [row.message for _, row in rows if isinstance(row, Bad)]
    assert bad[0].startswith(f"{path}:5: found ")
    assert bad[1].startswith(f"{path}:6: found ")
    assert bad[2] == f"{path}:7: found '4'; a row must have 2 columns (id, text), not 1."
    path.write_text('id\ttext\n1\tsaid "yes"\n2\t"quoted"\n')
    assert [row for _, row in read_table(path, "\t")] == [{"id": "1", "text": 'said "yes"'}, {"id": "2", "text": '"quoted"'}]
    path.write_text("1,a\n")
    assert [row for _, row in read_table(path, ",", ["id", "text"])] == [{"id": "1", "text": "a"}]
    path.write_text("id,id\n1,a\n")
    with pytest.raises(DataError, match=r"rows\.csv:1: found \['id', 'id'\]; a table must begin with a line of column names"):
        list(read_table(path))
    path.write_text('id,text\n1,"a\n2,b\n')
    ((where, bad_row),) = read_table(path)
    assert isinstance(bad_row, Bad)
    assert where == f"{path}:2", "a quote that is never closed is named by the line where it opens"


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n1," + "x" * 300_000 + "\n")
    ((_, row),) = read_table(path)
    assert isinstance(row, dict)
    assert len(row["text"]) == 300_000


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for data in (b"", b"\n \n", gzip.compress(b"")):
        path.write_bytes(data)
        for rows in (json_rows(path), tsv_rows(path, ("id", "text"))):
            with pytest.raises(DataError, match=r"rows\.jsonl: found 'no row'; this file must hold rows\. Fetch it again"):
                list(rows)


def test_files_by_url() -> None:
    """As the Hub's are read: opened by fsspec, here in memory; a fault is named by the URL."""
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/set/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"id": "007"}\n{"id": "8"}\n'))
    url = "memory://set/rows.jsonl.gz"
    assert list(read_jsonl(url)) == [(f"{url}:1", {"id": "007"}), (f"{url}:2", {"id": "8"})]
    with memory.open("/set/rows.parquet", "wb") as file:
        parquet.write_table(pa.table({"id": ["007"]}), file)
    assert [row for _, row in read_jsonl("memory://set/rows.parquet")] == [{"id": "007"}]
    with memory.open("/set/rows.csv", "wb") as file:
        file.write(b"id\n007\n")
    assert [row for _, row in read_table("memory://set/rows.csv")] == [{"id": "007"}]
    with pytest.raises(DataError, match=r"memory://set/absent: found 'FileNotFoundError: .*'; this file can't be read\. Check"):
        list(read_jsonl("memory://set/absent"))
    memory.rm("/set", recursive=True)


def test_either_takes_any_packed_neighbour(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        packed_file = tmp_path / f"a.tsv{ending}"
        packed_file.touch()
        assert either(tmp_path / "a.tsv") == packed_file
        packed_file.unlink()
    with pytest.raises(DataError, match=r"a\.tsv: found 'no such file'; .*\.zst\) is needed"):
        either(tmp_path / "a.tsv")
