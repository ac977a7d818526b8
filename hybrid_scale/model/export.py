"""Trained weights -> files: PEFT's layout, for checkpoints and adapters, and new folders in every format, whole or not at all.

Knows neither the engine that gathered the weights nor the run directory; texts come in as an encoder, scores as numbers.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from safetensors.torch import save_file

from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.errors import ModelError, RunError, describe
from hybrid_scale.model.card import model_card
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.standalone import write_json, write_merged, write_sentence_transformers
from hybrid_scale.model.trained import Format, Merging, Trained
from hybrid_scale.runs import readable

PREFIX = "backbone."


def save_trained(embedder: Embedder, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write full CPU weights, named as the embedder's parameters, in PEFT's layout (or `model.safetensors` without LoRA).

    Raises ModelError when a name of the trainable parameters is missing, or an adapter never left its initial zero.
    """
    from peft import PeftModel  # it loads bitsandbytes, and load.py must have set its logger before

    expected = {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        raise ModelError(f"{folder}: weights to save don't match the trained ones: {sorted(expected ^ set(weights))[:5]}.")
    folder.mkdir(parents=True, exist_ok=True)
    stripped = {name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in weights.items()}
    if isinstance(embedder.backbone, PeftModel):
        embedder.backbone.peft_config["default"].save_pretrained(str(folder))
        adapter = {name.replace(".default.", "."): tensor for name, tensor in stripped.items()}
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})


def export(trained: Trained, format: Format, folder: Path, merging: Merging) -> None:
    """Write one format to a new `folder`, whole or not at all.

    Raises ModelError: the format can't hold this model; RunError: `folder` has content.
    """
    write = {"adapter": _write_adapter, "merged": write_merged, "sentence-transformers": write_sentence_transformers}[format]
    with new_folder(folder) as beside:
        write(trained, beside, merging)
        (beside / "README.md").write_text(model_card(trained, format, merging), encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A sibling folder to fill; renamed to `path` (files fsynced) when the block ends well, removed when it doesn't.

    Raises RunError where `path` is a file or a folder with content.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(describe(str(path), "something there already", "an export never overwrites", "Choose a new folder."))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        yield beside
        readable(beside)
        for written in beside.rglob("*"):
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def push(folder: Path, name: str) -> str:
    """Upload a written folder to the Hub repository USER/NAME, private where it is new; returns its address.

    The token comes from the environment or `hf auth login`. Raises ModelError: not logged in, refused, unreachable.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and Path(base := json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]).exists():
        rule = "nobody else has this folder, and the adapter needs its base"
        raise ModelError(describe("model.base", base, rule, "Export again with --base NAME, its name on the Hub."))
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"hybrid_scale {version('hybrid_scale')}")
    except Exception as error:  # the Hub's HTTP library, and its errors, change between releases
        said = str(error).replace(get_token() or "\0", "(token)")
        remedy = f"{folder} is written; log in with `hf auth login` or set HF_TOKEN, then upload it."
        raise ModelError(describe("--push", name, f"the Hub refused: {said}", remedy)) from None
    return f"https://huggingface.co/{name}"


def _write_adapter(trained: Trained, folder: Path, merging: Merging) -> None:
    """PEFT's layout, and `hybrid_scale.yaml` to load it with this project."""
    if trained.config.model.lora is None:
        rule = "the run trained all weights, there is no adapter"
        raise ModelError(describe("--format", "adapter", rule, "Use merged or sentence-transformers."))
    shutil.copyfile(trained.weights / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((trained.weights / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": trained.base, "revision": trained.config.model.revision, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    write_json(folder / "adapter_config.json", config)
    (folder / "hybrid_scale.yaml").write_text(dump_config(portable_config(trained)), encoding="utf-8")


def portable_config(trained: Trained) -> RunConfig:
    """The run's config without the paths of its machine, except that of a base which has no name on the Hub."""
    config = trained.config
    data = {
        "train": Path(config.data.train).name,
        **{key: tuple(Path(path).name for path in getattr(config.data, key)) for key in ("evaluate", "evaluate_during")},
    }
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"directory": f"runs/{config.run.name}"}),
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"base": trained.base}),
            "training": config.training.model_copy(update={"deepspeed": Path(config.training.deepspeed).name}),
        }
    )
