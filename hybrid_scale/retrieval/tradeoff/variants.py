"""The variants of an index compression study by name: how each index is built, opened for search, and how large it is by formula.

    flat:fp32 flat:fp16 flat:bf16    every vector, in that type
    sq:8 sq:4                        a byte or half a byte a dimension, ranges trained
    pq:M opq:M                       M bytes a vector; opq rotates first
    ivf:LISTS:PROBES                 LISTS cells of fp32 vectors, PROBES of them searched
    hnsw:LINKS:EF                    a graph over fp32 vectors, EF candidates kept while searching
    rabitq binary                    one bit a dimension, after centring and a random rotation (else neighbours are lost)
    dims:N pca:N                     the first N dimensions, or the N principal ones, unit length again, fp32
    gpu-flat gpu-cagra:DEGREE        the same on a GPU; refused with the reason where they can't run
    BASE+rescore:F                   F * k results of BASE, ordered by their fp16 vectors

What is learned (codes, cells, ranges) is learned from all vectors, or from a sample of 1 GiB (corpus.py); then the vectors are
added block by block. In memory stands the index itself, of the size given by formula; cagra also takes the corpus as float32.
Random choices are seeded. Knows no text, no judgment and no rank. Scores are inner products.

Shapes: n vectors, D dimensions, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np

from hybrid_scale.errors import DataError, describe, nearest
from hybrid_scale.retrieval.tradeoff.corpus import Corpus
from hybrid_scale.retrieval.tradeoff.indexes import Binary, Faiss, Index, OnGpu, Reduced, Rescored, signs

SEED = 1234
FEWEST_FOR_CODES = 256
"""A codebook of 8 bits is trained from at least as many vectors."""


@dataclass(frozen=True)
class Variant:
    """One point of the study. Variants of one `base` differ in how they search, and share what was built."""

    name: str
    base: str
    build: Callable[[Corpus], Any]
    """The corpus -> what `open` takes first."""
    open: Callable[[Any, Corpus], Index]
    """What was built, and the corpus again; sets how it is searched."""
    bytes_per_vector: float
    """By formula, tables that don't grow with n left out."""
    refusal: str | None = None
    """Why it can't run here."""
    outside_per_vector: float = 0.0
    """Of the bytes, those that stay where the corpus lies: vectors to score again with."""


def parse(name: str, passages: int, dimensions: int) -> Variant:
    """The variant of that name for a corpus of this size. Raises DataError: no such variant, numbers that don't fit."""
    base, plus, again = name.partition("+")
    kind, *given = base.split(":")
    if kind not in MAKERS:
        raise DataError(describe("variant", name, "no such index", nearest(kind, MAKERS)))
    make, wanted = MAKERS[kind]
    if len(given) != len(wanted):
        raise DataError(describe("variant", name, f"must read {':'.join((kind, *wanted))}"))
    variant = make(name, base, tuple(given), passages, dimensions)
    if not plus:
        return variant
    word, _, factor = again.partition(":")
    if word != "rescore" or not factor.isdecimal() or int(factor) < 1:
        raise DataError(describe("variant", name, "after + comes rescore:F with F from 1"))
    return _rescored(variant, name, int(factor), dimensions)


def defaults(passages: int, dimensions: int) -> list[str]:
    """Every family, at sizes that suit the corpus. Those that can't run here are in it: they are reported as refused."""
    small, large = (_divisor(dimensions, part) for part in (8, 4))
    lists = 2 ** max(4, round(np.log2(4 * passages**0.5)))
    return [
        *("flat:fp32", "flat:fp16", "flat:bf16", "sq:8", "sq:4"),
        *(f"pq:{large}", f"pq:{small}", f"opq:{small}", f"opq:{small}+rescore:4"),
        *(f"ivf:{lists}:{probes}" for probes in (4, 16, 64) if probes < lists),
        *(f"hnsw:32:{width}" for width in (32, 128, 512)),
        *("rabitq", "rabitq+rescore:4", "binary", "binary+rescore:4", "binary+rescore:16"),
        *(f"{kind}:{dimensions // part}" for kind in ("dims", "pca") for part in (2, 4)),
        *("gpu-flat", "gpu-cagra:64"),
    ]


def _divisor(dimensions: int, part: int) -> int:
    """The largest number of sub-vectors up to dimensions / part that divides the dimensions."""
    return next(count for count in range(max(1, dimensions // part), 0, -1) if dimensions % count == 0)


def _rescored(variant: Variant, name: str, factor: int, dimensions: int) -> Variant:
    def open_(built: Any, corpus: Corpus) -> Index:
        return Rescored(variant.open(built, corpus), corpus, factor)

    size = variant.bytes_per_vector + 2 * dimensions
    return replace(variant, name=name, open=open_, bytes_per_vector=size, outside_per_vector=2 * dimensions)


def _plain(built: Any, corpus: Corpus) -> Index:
    return Faiss(built)


def _ready(built: Any, corpus: Corpus) -> Index:
    return built


# ---------------------------------------------------------------------------------------------------------- makers

Given = tuple[str, ...]


def _number(name: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise DataError(describe(f"variant {name}", text, f"must be a whole number from {low} to {high}"))
    return int(text)


def _filled(index: Any, corpus: Corpus) -> Any:
    if not index.is_trained:
        index.train(corpus.sample())
    for block in corpus.blocks():
        index.add(block)
    return index


def _flat(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    types = {"fp32": (None, 4), "fp16": (faiss.ScalarQuantizer.QT_fp16, 2), "bf16": (faiss.ScalarQuantizer.QT_bf16, 2)}
    if given[0] not in types:
        raise DataError(describe(f"variant {name}", given[0], f"must be one of {', '.join(types)}"))
    code, width = types[given[0]]
    return Variant(name, base, lambda corpus: _filled(_scalar(dimensions, code), corpus), _plain, width * dimensions)


def _scalar(dimensions: int, code: int | None) -> Any:
    if code is None:
        return faiss.IndexFlatIP(dimensions)
    return faiss.IndexScalarQuantizer(dimensions, code, faiss.METRIC_INNER_PRODUCT)


def _sq(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    codes = {"8": faiss.ScalarQuantizer.QT_8bit, "4": faiss.ScalarQuantizer.QT_4bit}
    if given[0] not in codes:
        raise DataError(describe(f"variant {name}", given[0], "must be 8 or 4"))
    size = dimensions if given[0] == "8" else (dimensions + 1) // 2
    return Variant(name, base, lambda corpus: _filled(_scalar(dimensions, codes[given[0]]), corpus), _plain, size)


def _pq(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    parts = _number(name, given[0], 1, dimensions)
    if dimensions % parts:
        raise DataError(describe(f"variant {name}", parts, f"must divide the {dimensions} dimensions"))

    def build(corpus: Corpus) -> Any:
        codes = faiss.IndexPQ(dimensions, parts, 8, faiss.METRIC_INNER_PRODUCT)
        if not name.startswith("opq"):
            return _filled(codes, corpus)
        rotation = faiss.OPQMatrix(dimensions, parts)
        rotation.niter, rotation.niter_pq, rotation.max_train_points = 10, 4, 16_384
        return _filled(faiss.IndexPreTransform(rotation, codes), corpus)

    return Variant(name, base, build, _plain, parts, _too_few(passages))


def _too_few(passages: int) -> str | None:
    return None if passages >= FEWEST_FOR_CODES else f"codebooks need {FEWEST_FOR_CODES} vectors, the corpus holds {passages}"


def _ivf(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    lists = _number(name, given[0], 1, passages)
    probes = _number(name, given[1], 1, lists)

    def build(corpus: Corpus) -> Any:
        coarse = faiss.IndexFlatIP(dimensions)
        index = faiss.IndexIVFFlat(coarse, dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # silences a warning; small corpora are meant to show what they show
        return coarse, _filled(index, corpus)

    def open_(built: Any, corpus: Corpus) -> Index:
        built[1].nprobe = probes
        return Faiss(built[1])

    return Variant(name, f"ivf:{lists}", build, open_, 4 * dimensions + 8)


def _hnsw(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    links, width = _number(name, given[0], 2, 256), _number(name, given[1], 1, 1_000_000)

    def open_(built: Any, corpus: Corpus) -> Index:
        built.hnsw.efSearch = width
        return Faiss(built)

    make = lambda: faiss.IndexHNSWFlat(dimensions, links, faiss.METRIC_INNER_PRODUCT)  # noqa: E731
    size = 4 * dimensions + 8 * links
    return Variant(name, f"hnsw:{links}", lambda corpus: _filled(make(), corpus), open_, size)


def _rotation(dimensions: int) -> Any:
    rotation = faiss.RandomRotationMatrix(dimensions, dimensions)
    rotation.init(SEED)
    return rotation


def _rabitq(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    def build(corpus: Corpus) -> Any:
        codes = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT)
        return _filled(faiss.IndexPreTransform(_rotation(dimensions), codes), corpus)

    return Variant(name, base, build, _plain, (dimensions + 7) // 8 + 8)


def _binary(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    width = -(-dimensions // 8) * 8

    def build(corpus: Corpus) -> Binary:
        rotation = faiss.RandomRotationMatrix(dimensions, width)
        rotation.init(SEED)
        index = faiss.IndexBinaryFlat(width)
        mean = corpus.mean()
        for block in corpus.blocks():
            index.add(signs(mean, rotation, block))
        return Binary(mean, rotation, index)

    return Variant(name, base, build, _ready, width // 8)


def _dims(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    kept = _number(name, given[0], 1, dimensions)
    return Variant(name, base, lambda corpus: _reduced(lambda x: x[:, :kept], kept, corpus, 0), _ready, 4 * kept)


def _pca(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    kept = _number(name, given[0], 1, dimensions)

    def build(corpus: Corpus) -> Reduced:
        """Axes of the uncentred vectors, which keep inner products best."""
        gram = np.zeros((dimensions, dimensions))
        for block in corpus.blocks():
            wide = block.astype(np.float64)
            gram += wide.T @ wide
        axes = np.linalg.eigh(gram)[1][:, ::-1][:, :kept].astype(np.float32)
        return _reduced(lambda x: x @ axes, kept, corpus, axes.nbytes)

    return Variant(name, base, build, _ready, 4 * kept)


def _reduced(project: Callable[[np.ndarray], np.ndarray], kept: int, corpus: Corpus, tables: int) -> Reduced:
    def reduce(rows: np.ndarray) -> np.ndarray:
        return _unit(np.ascontiguousarray(project(rows)))

    index = faiss.IndexFlatIP(kept)
    for block in corpus.blocks():
        index.add(reduce(block))
    return Reduced(reduce, Faiss(index), tables)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def _gpu(name: str, base: str, given: Given, passages: int, dimensions: int) -> Variant:
    degree = _number(name, given[0], 4, 512) if given else 0

    def build(corpus: Corpus) -> OnGpu:
        gpu: Any = faiss  # its GPU classes exist in GPU builds only
        resources = gpu.StandardGpuResources()
        if not degree:
            return OnGpu(_filled(gpu.GpuIndexFlatIP(resources, dimensions), corpus))
        config = gpu.GpuIndexCagraConfig()
        config.graph_degree, config.intermediate_graph_degree = degree, 2 * degree
        index = gpu.GpuIndexCagra(resources, dimensions, faiss.METRIC_INNER_PRODUCT, config)
        index.train(corpus.sample(4 * dimensions * len(corpus)))  # its graph is built at once, over all vectors
        return OnGpu(index)

    refusal = _gpu_refusal("GpuIndexCagra" if degree else "GpuIndexFlatIP", "faiss-gpu-cuvs" if degree else "faiss-gpu")
    size = 4 * dimensions + 4 * degree
    return Variant(name, base, build, _ready, size, refusal)


def _gpu_refusal(needed: str, package: str) -> str | None:
    if not hasattr(faiss, needed):
        return f"this faiss has no {needed}: it comes with the package {package}"
    return None if faiss.get_num_gpus() > 0 else "no GPU is visible"


Maker = Callable[[str, str, Given, int, int], Variant]
MAKERS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "flat": (_flat, ("TYPE",)),
    "sq": (_sq, ("BITS",)),
    "pq": (_pq, ("M",)),
    "opq": (_pq, ("M",)),
    "ivf": (_ivf, ("LISTS", "PROBES")),
    "hnsw": (_hnsw, ("LINKS", "EF")),
    "rabitq": (_rabitq, ()),
    "binary": (_binary, ()),
    "dims": (_dims, ("N",)),
    "pca": (_pca, ("N",)),
    "gpu-flat": (_gpu, ()),
    "gpu-cagra": (_gpu, ("DEGREE",)),
}
