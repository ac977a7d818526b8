"""The public sets of BEIR (2104.08663) by name: their split, their place on the Hub, the rule about a query's own id.

Judgments are those of `test` (MS MARCO: `dev`), queries those that they name, a passage is title + space + text, and there is no
prompt. Read from a folder in BEIR's layout, or from the Hub (`mteb/...` by default, or `BeIR/...`).
ArguAna's and Quora's queries stand in the corpus: BEIR's evaluation drops the passage whose id is the query's (`drop_own_id`).
BEIR's code does so for every set, and mteb for those marked here; in FEVER, FiQA and MS MARCO such ids are equal by chance.
CQADupStack is twelve sets (`part_of`), prepared together under one folder; its score is the mean of theirs.
Bio-ASQ, Signal-1M, TREC-NEWS and Robust04 aren't public: read them with the source `beir` from a folder.
Refuses to score.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources import beir, hub
from hybrid_scale.data.sources.hub_data import is_copy
from hybrid_scale.errors import ConfigError, describe, nearest

FORUMS = (
    *("android", "english", "gaming", "gis", "mathematica", "physics", "programmers", "stats", "tex", "unix"),
    *("webmasters", "wordpress"),
)
"""The parts of CQADupStack."""


@dataclass(frozen=True)
class BeirSet:
    """One set of BEIR."""

    hub: str
    split: str = "test"
    drop_own_id: bool = False
    part_of: str | None = None


SETS: dict[str, BeirSet] = {
    "arguana": BeirSet("mteb/arguana", drop_own_id=True),
    "climate-fever": BeirSet("mteb/climate-fever"),
    "dbpedia-entity": BeirSet("mteb/dbpedia"),
    "fever": BeirSet("mteb/fever", drop_own_id=True),
    "fiqa": BeirSet("mteb/fiqa", drop_own_id=True),
    "hotpotqa": BeirSet("mteb/hotpotqa"),
    "msmarco": BeirSet("mteb/msmarco", split="dev", drop_own_id=True),
    "nfcorpus": BeirSet("mteb/nfcorpus"),
    "nq": BeirSet("mteb/nq"),
    "quora": BeirSet("mteb/quora", drop_own_id=True),
    "scidocs": BeirSet("mteb/scidocs"),
    "scifact": BeirSet("mteb/scifact"),
    "trec-covid": BeirSet("mteb/trec-covid"),
    "webis-touche2020": BeirSet("mteb/touche2020"),
    **{
        f"cqadupstack-{forum}": BeirSet(
            "mteb/CQADupstackAndroidRetrieval" if forum == "android" else f"mteb/cqadupstack-{forum}", part_of="cqadupstack"
        )
        for forum in FORUMS
    },
}
"""BEIR's name -> the set."""


def known(name: str) -> BeirSet:
    """Raises ConfigError on an unknown name, and on a set that comes in parts."""
    if parts_of(name):
        rule = f"comes in {len(parts_of(name))} parts, one set each"
        raise ConfigError(describe("beir_set: name", name, rule, f"Prepare {name}-{parts_of(name)[0]} and the others."))
    if name not in SETS:
        raise ConfigError(describe("beir_set: name", name, "no such set of BEIR", nearest(name, SETS)))
    return SETS[name]


def parts_of(name: str) -> tuple[str, ...]:
    """Names of the parts of a set that comes in parts (`android`, ...): empty for every other name."""
    return FORUMS if name == "cqadupstack" else ()


def read(name: str, path: str = "", revision: str = "", config: str = "") -> Iterator[Record]:
    """The set `name` from the folder `path`, from the Hub id `path`, or, without one, from mteb's copy on the Hub.

    config: the set's name in the configs of a Hub id that holds several sets (`scifact` of scifact-corpus).
    """
    chosen = known(name)
    folder = Path(path)
    if path and folder.is_dir() and not is_copy(folder):
        inner = folder / name.removeprefix("cqadupstack-") if chosen.part_of else folder
        return beir.read(inner if inner.is_dir() else folder, chosen.split)
    where = path or chosen.hub
    beside = path and Path(f"{path}-qrels").is_dir()
    qrels = f"{where}-qrels" if where.startswith("BeIR/") or beside else ""
    return hub.read(where, split=chosen.split, kind="retrieval", revision=revision, qrels=qrels, config=config)
