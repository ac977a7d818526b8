"""A training mix: several sources by name, each with its licence, in one training set.

A mix is a YAML file:

    name: standard
    sources:
      mmarco:                         # the name of the rows' source in the manifest
        reader: mmarco                # a source of launch/prepare.py
        path: raw/mmarco              # as --path (a list for several files)
        licence: what its card says
        languages: [en, de]           # all when left out
        contains: [mmarco]            # what it was made from: in-domain flags
        options: {max_queries: 100000}

Ids, groups and passage ids get the source's name in front, so that no two sources collide; passages with equal text become one
passage all the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hybrid_scale.config import Section, read_yaml, validate
from hybrid_scale.data.records import Bad, Note, Pair, Record
from hybrid_scale.errors import ConfigError, DataError, describe

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class MixSource(Section):
    reader: str
    path: str | tuple[str, ...] | None = None
    licence: Annotated[str, Field(min_length=1)]
    """As the data's card states it; it stands in the manifest and in reports."""
    url: str = ""
    """Where the data is published."""
    languages: tuple[str, ...] = ()
    split: str | None = None
    contains: tuple[str, ...] = ()
    options: dict[str, str | int | bool] = Field(default_factory=dict)

    def arguments(self) -> dict[str, str | list[str]]:
        """As the command line would give them."""
        given: dict[str, str | list[str]] = {key: _text(value) for key, value in self.options.items()}
        if self.path is not None:
            given["path"] = self.path if isinstance(self.path, str) else list(self.path)
        if self.languages:
            given["languages"] = ",".join(self.languages)
        return given | ({"split": self.split} if self.split else {})


class Mix(Section):
    name: Name
    sources: Annotated[dict[Name, MixSource], Field(min_length=1)]

    def facts(self) -> dict[str, Any]:
        """The manifest's `mix`: what can't be counted in the rows."""
        return {
            "name": self.name,
            "sources": {
                name: {"licence": source.licence, "url": source.url, "contains": list(source.contains)}
                for name, source in self.sources.items()
            },
        }

    @property
    def contains(self) -> list[str]:
        """All that its sources were made from."""
        return sorted({one for source in self.sources.values() for one in source.contains})


def load_mix(path: Path) -> Mix:
    """Raises ConfigError naming the key."""
    return validate(Mix, read_yaml(path), str(path))


Opener = Callable[[str, dict[str, str | list[str]]], Iterator[Record]]
"""Name of a reader and its options as text -> the records."""


def read(path: Path, languages: tuple[str, ...], opener: Opener) -> Iterator[Record]:
    """Rows of every source of the mix at `path`, in the order of the file.

    languages: of the sources that name none. Raises ConfigError and DataError naming the source.
    """
    mix = load_mix(path)
    for name, source in mix.sources.items():
        if source.reader == "mix":
            raise ConfigError(describe(f"{path}: sources.{name}.reader", "mix", "a mix must not hold a mix", "List its sources."))
        given = source.arguments()
        if languages and "languages" not in given:
            given["languages"] = ",".join(languages)
        try:
            for record in opener(source.reader, given):
                yield named(record, name)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{path}: sources.{name}: {error}") from None


def named(record: Record, name: str) -> Record:
    """The record as one of the source `name`. Raises DataError where it isn't a training row."""
    if isinstance(record, Bad | Note):
        return record
    if not isinstance(record, Pair):
        rule = "a training mix must be made of training sources, and this one gives a retrieval set"
        raise DataError(describe(record.where, type(record).__name__, rule, "Use the source `judged` for judged passages."))
    return replace(
        record,
        id=f"{name}:{record.id}",
        group=f"{name}:{record.group}",
        pid=f"{name}:{record.pid}",
        negatives=tuple((f"{name}:{pid}", text) for pid, text in record.negatives),
        source=name,
    )


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
