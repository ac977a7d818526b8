"""Families whose weights lie otherwise in their files than in memory, exported: sentence-transformers gives our vectors."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.errors import ModelError
from hybrid_scale.model.export import export, save_trained
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.trained import Merging, Trained
from tests.model.bases import run_over, write_base

TEXTS = ["the question", "die Antwort und die Frage: where is it?", "a"]


def trained_on(folder, family: str, **model) -> Trained:
    """A checkpoint whose adapters, or weights, are far from their start."""
    config = run_over(write_base(folder / "base", family), **model)
    embedder, generator = load_embedder(config.model, 1), torch.Generator().manual_seed(5)
    weights = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in embedder.named_parameters()
        if parameter.requires_grad
    }
    save_trained(embedder, weights, folder / "adapter")
    return Trained(config, folder / "adapter", 3, load_text_encoder(config))


def vectors(run: Trained, adapter: bool = True) -> np.ndarray:
    embedder = load_embedder(run.config.model, 0, run.weights if adapter else None).eval()
    with torch.no_grad():
        return embedder(**run.texts.collate(run.texts.encode("query", TEXTS))).numpy()


ATTENTION = {"rank": 4, "targets": ["q_proj", "o_proj"]}


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3_moe", ATTENTION),
        ("mixtral", ATTENTION),
        ("gpt_oss", ATTENTION),
        ("qwen3_moe", None),
        ("gemma3", {"rank": 4}),
        ("llava", {"rank": 4}),
        ("gemma3", None),
        ("gpt2", {"rank": 4}),
        ("opt", {"rank": 4}),
    ],
)
def test_sentence_transformers_gives_our_vectors(tmp_path, family, lora):
    run = trained_on(tmp_path, family, lora=lora)
    export(run, "sentence-transformers", tmp_path / "out", Merging("float32"))
    ours = vectors(run)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(TEXTS)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert float(np.abs(ours - vectors(run, adapter=False)).max()) > 1e-3


def test_adapters_on_weights_in_another_form_are_refused(tmp_path, monkeypatch):
    """As if transformers put the query projections together from two tensors each."""
    run = trained_on(tmp_path, "llama")
    from hybrid_scale.model import merge

    original = merge.Checkpoint

    class Halves(original):  # type: ignore[misc, valid-type]
        def __init__(self, folder):
            super().__init__(folder)
            self.where = {name.replace("q_proj.weight", "q_proj.half"): path for name, path in self.where.items()}

    monkeypatch.setattr(merge, "Checkpoint", Halves)
    monkeypatch.setattr(merge, "_renamer", lambda _: lambda name: name.replace("q_proj.half", "q_proj.weight"))
    with pytest.raises(ModelError, match=r"2 adapted weights \(layers.0.self_attn.q_proj, .*in another form"):
        export(run, "merged", tmp_path / "out", Merging("float32"))
