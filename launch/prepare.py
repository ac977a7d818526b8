"""Raw data -> a checked, prepared directory.

python launch/prepare.py demo --split train --out data/demo-train
python launch/prepare.py xquad_r --path raw/xquad-r --languages en,de --out data/xquad-r
python launch/prepare.py pairs --path a.jsonl.gz b.jsonl --out data/train --rejects rejects.jsonl --config run.yaml
python launch/prepare.py pairs --path nq.jsonl.gz --out data/train --contains nq        # so that results on NQ say in-domain
python launch/prepare.py beir_set --option name=scifact --path beir/scifact --out data/scifact
python launch/prepare.py beir_set --option name=cqadupstack --path beir/cqadupstack --out data/cqadupstack   # its twelve parts
python launch/prepare.py mix --path launch/configs/mix_standard.yaml --out data/train --decontaminate data/xquad_r

--decontaminate drops training rows that give an evaluation away (their query or most of their passage is one of a set's), with
their translations, and lists them in OUT/decontaminated.jsonl; the source is read twice.

The parts of a set are prepared one after another; those that are there already are kept.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import load_config
from hybrid_scale.data.decontaminate import Report, find, open_evaluations, without
from hybrid_scale.data.folder import Rejects
from hybrid_scale.data.prepared import open_manifest
from hybrid_scale.data.records import Record
from hybrid_scale.data.sources.beir_sets import parts_of
from hybrid_scale.data.sources.domains import OWN_READERS, check_contains, facts, held_out, judged_sources
from hybrid_scale.data.sources.mix import load_mix
from hybrid_scale.data.sources.registry import READERS, options, reader
from hybrid_scale.data.summary import summarize
from hybrid_scale.data.writing import write
from hybrid_scale.errors import ConfigError, DataError, HybridScaleError, describe, explain
from hybrid_scale.runs import write_text

PROGRESS_EVERY_ROWS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with a message on stderr."""
    given = read_arguments(_parser(), arguments)
    try:
        encoder = text_encoder(given.config) if given.config else None
        chosen = options(given.source, _options(given))
        given.contains = sorted({*given.contains, *contained(given.source, chosen)})
        check_contains(given.source, chosen, given.contains, given.in_domain_of)
        if given.decontaminate and (what := held_out(given.source, chosen)):
            rule = f"only a training set is decontaminated, and this is {what}; name the retrieval sets behind this option"
            raise ConfigError(describe("--decontaminate", given.source, rule, "Leave it out."))
        parts = parts_of(chosen["name"]) if given.source == "beir_set" else ()
        if parts:
            prepare_parts(given, chosen, parts, encoder)
        else:
            prepare(given, chosen, given.out, given.rejects, encoder)
    except (HybridScaleError, OSError) as error:
        print(explain(error), file=sys.stderr)
        return 2
    return 0


def prepare(given: argparse.Namespace, chosen: dict[str, Any], out: Path, rejects: Path | None, encoder: Any) -> None:
    """Read, check and write one set; print what it holds."""
    read = partial(reader(given.source), **chosen)
    source = {"name": given.source, **_plain(chosen)}
    listed = Rejects(rejects, "--rejects FILE lists bad rows there instead of stopping.")
    stated = facts(given.source, chosen, given.contains, given.in_domain_of)
    if given.source == "mix":
        stated["mix"] = load_mix(chosen["path"]).facts()
    if given.source == "held_in":
        stated = {**stated, **{key: value for key, value in inherited(chosen["path"]).items() if stated.get(key) is None}}
    report = None
    records = read()
    if given.decontaminate:
        groups, report = find(_with_progress(read()), open_evaluations(given.decontaminate))
        records = without(records, groups, report)
    write(_with_progress(records), out, source, listed, partial(complete, stated=stated, report=report))
    print(summarize(out))
    if report is not None:
        print(report.text())
    if encoder is not None:
        print("\n".join(write_token_lengths(out, encoder)))


def contained(source: str, chosen: dict[str, Any]) -> set[str]:
    """What training rows are known to be made from before they are read: what a mix says, and the sets that `judged` reads.

    Raises ConfigError: one of these is held out for evaluation.
    """
    if source == "judged":
        return set(judged_sources(open_manifest(chosen["path"], "retrieval"), str(chosen["path"])))
    if source != "mix":
        return set()
    mix = load_mix(chosen["path"])
    judged = [Path(one.path) for one in mix.sources.values() if one.reader == "judged" and isinstance(one.path, str)]
    found = {name for path in judged for name in contained("judged", {"path": path})}
    return found.union(mix.contains, *(OWN_READERS.get(one.reader, ()) for one in mix.sources.values()))


def inherited(path: Path) -> dict[str, Any]:
    """What a part of a training set takes over from the manifest of the whole."""
    manifest = open_manifest(path, "pairs")
    return {key: manifest[key] for key in ("contains", "mix", "decontamination") if key in manifest}


def complete(folder: Path, stated: dict[str, Any], report: Report | None) -> dict[str, Any]:
    """What the manifest states besides the counts, once all records are in `folder`. A decontaminated set also gets
    `decontaminated.jsonl` with every dropped row, before it is finished: it is never without."""
    if report is None:
        return stated
    write_text(folder / "decontaminated.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in report.rows))
    return {**stated, "decontamination": report.facts()}


def prepare_parts(given: argparse.Namespace, chosen: dict[str, Any], parts: Sequence[str], encoder: Any) -> None:
    """Each part as OUT/PART; a part that is there is kept, so that a stopped preparation goes on."""
    if (given.out / "manifest.json").exists():
        rule = f"{chosen['name']} comes in {len(parts)} parts, a folder of sets"
        raise DataError(describe(str(given.out), "a prepared set", rule, "Choose another --out."))
    path = chosen.get("path")
    absent = [part for part in parts if path and not (Path(path) / part).is_dir()]
    if absent:
        rule = f"needs a folder for each of its {len(parts)} parts; missing: {', '.join(absent)}"
        raise DataError(describe(str(path), chosen["name"], rule, "Leave --path out to read them from the Hub."))
    for part in parts:
        if (given.out / part / "manifest.json").is_file():
            print(f"{given.out / part}: is there, kept")
            continue
        rejects = given.rejects and given.rejects.with_stem(f"{given.rejects.stem}.{part}")
        prepare(given, {**chosen, "name": f"{chosen['name']}-{part}"}, given.out / part, rejects, encoder)


def text_encoder(config: Path) -> Any:
    """The run's tokenizer and prompts. Loaded before the data is read, so that a wrong config costs nothing."""
    from hybrid_scale.data.text import load_text_encoder

    return load_text_encoder(load_config(config))


def write_token_lengths(directory: Path, encoder: Any) -> list[str]:
    """Count the tokens of every text, beside the data; returns a line per table."""
    from hybrid_scale.data.text import write_length_tables

    return [
        f"  tokens of {name}: mean {table['mean']}, longest {table['longest']}, {table['at_limit']:.1%} at the limit"
        for name, table in write_length_tables(directory, encoder).items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"one of: {', '.join(READERS)}")
    parser.add_argument("--out", type=Path, required=True, help="directory to make; must be absent or empty")
    parser.add_argument("--path", nargs="+", help="file or folder of the source; several files for pairs and bitext")
    parser.add_argument("--split")
    parser.add_argument("--languages", help="comma-separated codes; all when left out")
    parser.add_argument("--rejects", type=Path, help="list bad rows in this file instead of stopping at the first one")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="another option of the reader")
    parser.add_argument(
        "--contains", nargs="+", default=[], metavar="SOURCE", help="what a training set was made from: in-domain flags"
    )
    parser.add_argument(
        "--in-domain-of",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="what makes a retrieval set in-domain, beside what is known of it; a source of your own is x-NAME",
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="SET[:relevant]",
        help="prepared retrieval sets: training rows that give them away are dropped and listed; `:relevant` compares with the"
        " relevant passages of a large corpus alone",
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="also count tokens with this run's tokenizer and prompts")
    return parser


def _options(given: argparse.Namespace) -> dict[str, str | list[str]]:
    named = {"path": given.path, "split": given.split, "languages": given.languages}
    chosen: dict[str, str | list[str]] = {key: value for key, value in named.items() if value}
    for option in given.option:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ConfigError(describe("--option", option, "must read key=value"))
        chosen[key] = value
    return chosen


def _plain(chosen: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them."""
    return json.loads(json.dumps(chosen, default=str))


def _with_progress(records: Iterator[Record]) -> Iterator[Record]:
    """The records, with their rate on stderr now and then."""
    start = time.monotonic()
    for number, record in enumerate(records, start=1):
        yield record
        if number % PROGRESS_EVERY_ROWS == 0:
            print(f"{number:,} records, {number / (time.monotonic() - start):,.0f} a second", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
