"""A tiny model, a small parallel data set and a run config over them."""

from pathlib import Path
from typing import Any

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.model.tiny import write_model, write_tokenizer
from tests.data.synthetic import parallel

ROOT = Path(__file__).resolve().parent.parent.parent


def write_inputs(folder: Path, negatives: int = 0) -> Path:
    """`folder/train` (prepared pairs) and `folder/model` (random Llama with its tokenizer)."""
    pairs = parallel(folder / "train", groups=60, negatives=negatives)
    texts = pairs.queries.column("text") + pairs.passages.column("text")
    tokenizer = write_tokenizer(texts, folder / "model", vocabulary=400)
    write_model(folder / "model", len(tokenizer), hidden=32, layers=2, heads=4)
    return folder


def config_tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A small float32 run; keyword arguments are merged into its sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"directory": str(folder / "run"), "seed": 1},
        "data": {"train": str(folder / "train"), "max_query_tokens": 32, "max_passage_tokens": 64},
        "sampler": {"global_batch": 16, "pool_rows": 4},
        "model": {"base": str(folder / "model"), "dtype": "float32", "gradient_checkpointing": False, "lora": {"rank": 4}},
        "loss": {"temperature": 0.05},
        "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 0.0},
        "training": {"engine": "plain", "max_steps": 4, "max_tokens_per_micro_batch": 128},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def make_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, config_tree(folder, **sections), "test")


def zero(stage: int, folder: Path) -> str:
    """Path of a DeepSpeed JSON for a tiny model: nothing persistent, so that ZeRO-3 really shares every weight."""
    path = folder / f"zero{stage}.json"
    path.write_text(
        '{"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",'
        ' "bf16": {"enabled": false}, "zero_allow_untested_optimizer": true,'
        f' "zero_optimization": {{"stage": {stage}, "overlap_comm": false, "contiguous_gradients": true,'
        ' "reduce_bucket_size": 100000, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}}'
    )
    return str(path)
