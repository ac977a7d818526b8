"""Names of the sources, and their options from text.

Knows no format: a reader's signature is the list of its options.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources import (
    again,
    beir,
    beir_sets,
    belebele,
    bitext,
    demo,
    hub,
    miracl,
    mix,
    mlqa_r,
    mmarco,
    mr_tydi,
    pairs,
    xquad,
    xquad_r,
)
from hybrid_scale.errors import ConfigError, describe, nearest

Reader = Callable[..., Iterator[Record]]


def read_mix(path: Path, languages: tuple[str, ...] = ()) -> Iterator[Record]:
    """Rows of every source that the mix at `path` names (sources/mix.py)."""
    return mix.read(path, languages, lambda name, given: reader(name)(**options(name, given)))


READERS: dict[str, Reader] = {
    "beir": beir.read,
    "beir_set": beir_sets.read,
    "belebele": belebele.read,
    "bitext": bitext.read,
    "demo": demo.read,
    "held_in": again.read_held_in,
    "held_out": again.read_held_out,
    "hub": hub.read,
    "judged": again.read_judged,
    "miracl": miracl.read,
    "miracl_hard": miracl.read_hard_negatives,
    "mix": read_mix,
    "mlqa_r": mlqa_r.read,
    "mmarco": mmarco.read,
    "mr_tydi": mr_tydi.read,
    "nq": beir.read,
    "pairs": pairs.read,
    "xquad": xquad.read,
    "xquad_r": xquad_r.read,
}


def reader(name: str) -> Reader:
    """Raises ConfigError on an unknown name."""
    if name not in READERS:
        raise ConfigError(describe("source", name, "no such source", nearest(name, READERS)))
    return READERS[name]


def options(name: str, given: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """Keyword arguments for the reader, text turned into the types of its signature.

    `path` may be given for a reader's `paths`. Raises ConfigError: unknown, missing or ill-formed options.
    """
    read = reader(name)
    types = {key: kind for key, kind in get_type_hints(read).items() if key != "return"}
    result = {}
    for given_key, value in given.items():
        key = "paths" if given_key == "path" and "paths" in types else given_key
        if key not in types:
            raise ConfigError(describe(f"source {name}", key, "no such option", nearest(key, types)))
        result[key] = _parse(f"source {name}: {key}", value, types[key])
    for key, parameter in inspect.signature(read).parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in result:
            give = "--path" if key in ("path", "paths") else f"--option {key}=VALUE"
            raise ConfigError(describe(f"source {name}", f"no {key}", "this source needs it", f"Give {give}."))
    return result


def _parse(where: str, value: str | list[str], kind: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    if kind == tuple[Path, ...]:
        return tuple(map(Path, values))
    if len(values) != 1:
        raise ConfigError(describe(where, values, "takes one value"))
    text = values[0]
    if kind == tuple[str, ...]:
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        if not parts:
            raise ConfigError(describe(where, text, "names nothing", "Leave it out to take all."))
        return parts
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(describe(where, text, "must be true or false"))
        return text.lower() == "true"
    if kind is int:
        if not text.isdecimal():
            raise ConfigError(describe(where, text, "must be a whole number, 0 or more"))
        return int(text)
    if kind in (str, Path):
        return kind(text)
    return _mapping(where, text)


def _mapping(where: str, text: str) -> dict[str, str]:
    """`ours=theirs,ours==constant`."""
    items = [item.partition("=") for item in text.split(",")]
    if not all(key and equals for key, equals, _ in items):
        raise ConfigError(describe(where, text, "must read ours=theirs,ours==constant"))
    return {key.strip(): value.strip() for key, _, value in items}
