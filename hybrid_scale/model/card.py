"""The model card of an exported folder: what the model is, how to load it, its scores and settings. Text in, text out."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hybrid_scale.config import ModelSettings
from hybrid_scale.model.trained import Format, Merging, Trained

ROLES = ("query", "passage")


def model_card(trained: Trained, format: Format, merging: Merging) -> str:
    """README.md of a written folder: YAML front matter as the Hub reads it, then what it is, how to load it, its scores."""
    front = yaml.safe_dump(_front_matter(trained, format), sort_keys=False, allow_unicode=True)
    name = trained.config.run.name
    parts = [
        f"---\n{front}---\n\n# {name}",
        _introduction(trained, format, merging),
        f"## Load\n\n{_how_to_load(trained, format)}",
        f"## Scores\n\n{_score_table(trained.scores)}" if trained.scores else "",
        f"## Settings\n\n{_table(('setting', 'value'), _settings(trained))}",
        f"Written by hybrid_scale {version('hybrid_scale')}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(trained: Trained, format: Format) -> dict[str, Any]:
    library = {"adapter": "peft", "merged": "transformers", "sentence-transformers": "sentence-transformers"}[format]
    languages = list(dict.fromkeys(found[0] for tag in trained.languages if (found := re.match(r"[a-z]{2,3}(?![a-z])", tag))))
    front: dict[str, Any] = {
        "license": trained.license,
        "language": languages,
        "library_name": library,
        "pipeline_tag": "feature-extraction",
        "base_model": trained.public_base,
        "base_model_relation": ("adapter" if format == "adapter" else "finetune") if trained.public_base else None,
        "tags": ["sentence-transformers", "feature-extraction"],
    }
    return {key: value for key, value in front.items() if value}


def _introduction(trained: Trained, format: Format, merging: Merging) -> str:
    settings = trained.config.model
    lines = [
        f"A text embedding model: {_base_text(trained)} after {trained.step} steps of contrastive training"
        f" ({'all weights' if settings.lora is None else 'LoRA'}). Vectors have length 1; similarity is their dot product."
    ]
    if trained.languages:
        lines.append(f"Languages of the training data: {', '.join(trained.languages)}.")
    if trained.fingerprint:
        lines.append(f"Fingerprint of the training data: `{trained.fingerprint}`.")
    if format != "adapter":
        lines.append(_merge_note(settings, merging))
    if format == "sentence-transformers":
        lines.append(_limit_note(trained.texts.max_tokens))
    if format != "adapter" and settings.attention == "bidirectional":
        lines.append("Attention is bidirectional: `is_causal: false` in config.json. Tested with transformers 5.23.")
    return "\n\n".join(lines)


def _base_text(trained: Trained) -> str:
    revision = trained.config.model.revision
    name = trained.public_base or Path(trained.base).name
    return f"`{name}`" + (f" (revision `{revision}`)" if revision else "")


def _merge_note(settings: ModelSettings, merging: Merging) -> str:
    if settings.lora is None:
        return f"The weights are the trained ones, in {merging.dtype}."
    note = f"The adapter is merged into the weights (added in float32, rounded to {merging.dtype} once)."
    if settings.quantization == "nf4":
        note += (
            " It was trained on 4-bit (NF4) weights and is merged into those weights, dequantised."
            if merging.into == "nf4"
            else " It was trained on 4-bit (NF4) weights and is merged into the original ones: vectors differ slightly from"
            " those of the training run."
        )
    return note


def _limit_note(limits: Mapping[Any, int]) -> str:
    note = f"Texts are cut at {limits['passage']} tokens, prompt and end token included."
    if limits["query"] == limits["passage"]:
        return note
    return (
        f"{note} Queries are cut at {limits['query']}: `encode_query` does so"
        ' (sentence-transformers 6 or newer), `encode(..., prompt_name="query")` doesn\'t.'
    )


def _how_to_load(trained: Trained, format: Format) -> str:
    if format == "sentence-transformers":
        code = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
queries = model.encode_query(["..."])
passages = model.encode_document(["..."])
scores = model.similarity(queries, passages)"""
    elif format == "adapter":
        code = """from pathlib import Path

from hybrid_scale.config import load_config
from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.model.load import load_embedder

folder = Path("FOLDER")
config = load_config(folder / "hybrid_scale.yaml")
embedder = load_embedder(config.model, seed=0, adapter=folder).eval()
encoder = for_evaluation(load_text_encoder(config), config.evaluation)
vectors = embedder(**encoder.collate(encoder.encode("query", ["..."])))"""
    else:
        prompt = trained.texts.prompts["query"]
        code = f"""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # puts the end token after the cut
model = AutoModel.from_pretrained("FOLDER").eval()
batch = tokenizer([{prompt!r} + "..."], padding=True, truncation=True, return_tensors="pt")
states = model(**batch).last_hidden_state  # then pool ({trained.config.model.pooling}) and normalise"""
    return f"```python\n{code}\n```"


def _score_table(scores: Sequence[dict[str, Any]]) -> str:
    """A row a measure, a column a set."""
    names = list(dict.fromkeys(name for score in scores for name in score["metrics"]))
    rows = []
    for name in names:
        values = [score["metrics"].get(name) for score in scores]
        rows.append((name, *("-" if value is None else f"{value:.4f}" for value in values)))
    return _table(("measure", *(str(score["task"]) for score in scores)), rows)


def _settings(trained: Trained) -> list[tuple[str, str]]:
    config = trained.config
    model, lora = config.model, config.model.lora
    shown: dict[str, object] = {
        "base": _base_text(trained).replace("`", ""),
        "pooling": model.pooling,
        "attention": model.attention,
        "query prompt": json.dumps(model.query_prompt, ensure_ascii=False),
        "passage prompt": json.dumps(model.passage_prompt, ensure_ascii=False),
        "end token": " ".join(map(str, trained.texts.tokenizer.convert_ids_to_tokens(list(trained.texts.ends)))),
        "longest query, passage in training (tokens)": f"{config.data.max_query_tokens}, {config.data.max_passage_tokens}",
        "longest query, passage in evaluation (tokens)": ", ".join(str(trained.texts.max_tokens[role]) for role in ROLES),
        "weights in training": f"{model.dtype}, quantization: {model.quantization}",
        "LoRA": "none" if lora is None else f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {lora.targets}",
        "batches": f"{config.sampler.arm}, mono share {config.sampler.mono_share:g}, {config.sampler.composition}",
        "global batch (rows)": config.sampler.global_batch,
        "hard negatives a row": config.sampler.hard_negatives,
        "temperature": f"{config.loss.temperature:g}",
        "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "steps": f"{trained.step} of {config.training.max_steps}",
        "seed": config.run.seed,
    }
    return [(name, str(value)) for name, value in shown.items()]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
