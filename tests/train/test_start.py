"""What a training refuses before it opens data or loads a model: trackers, DeepSpeed JSONs."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ConfigError
from hybrid_scale.train import engine
from hybrid_scale.train.engine import check, read_deepspeed_config
from tests.train.setup import make_config, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("start"))


# Trackers


@pytest.mark.parametrize("name", ["tensorbord", "Wandb", "all", "mlflow "])
def test_an_unknown_tracker_is_refused_with_the_known_names(folder: Path, name: str) -> None:
    config = make_config(folder, training={"trackers": ["tensorboard", name]})
    with pytest.raises(ConfigError, match=r"training.trackers: found .* must be one of aim, comet_ml, mlflow, tensorboard"):
        check(config)


def test_a_tracker_that_is_not_installed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "get_available_trackers", lambda: ["tensorboard"])
    check(make_config(folder, training={"trackers": ["tensorboard"]}))
    said = "found 'comet_ml'; its package must be installed. Install comet-ml, or leave it out. Installed: tensorboard."
    with pytest.raises(ConfigError, match=said):
        check(make_config(folder, training={"trackers": ["comet_ml"]}))


# DeepSpeed JSONs


def with_json(folder: Path, zero: dict[str, Any], **changes: Any) -> RunConfig:
    keys = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    path = folder / "own.json"
    path.write_text(json.dumps({**dict.fromkeys(keys, "auto"), "zero_optimization": zero, **changes}))
    return make_config(folder, training={"engine": "deepspeed", "deepspeed": str(path)}, optimizer={"max_gradient_norm": 0.5})


def test_open_values_are_filled(folder: Path) -> None:
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": 3, **dict.fromkeys(buckets, "auto"), "stage3_gather_16bit_weights_on_model_save": "auto"}
    found = read_deepspeed_config(with_json(folder, zero, train_batch_size="auto", bf16={"enabled": "auto"}))
    assert found == {
        **{"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1},
        **{"bf16": {"enabled": False}, "fp16": {"enabled": False}, "zero_force_ds_cpu_optimizer": False},
        "zero_optimization": {
            **{"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
            **{"reduce_bucket_size": 1024, "stage3_prefetch_bucket_size": 921, "stage3_param_persistence_threshold": 320},
        },
    }  # a hidden size of 32


@pytest.mark.parametrize(
    ("zero", "changes", "said"),
    [
        ({"stage": 2}, {"train_micro_batch_size_per_gpu": 4}, "per_gpu: found 4; a rank's micro-batches are planned by tokens"),
        ({"stage": 2}, {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps: found 8; a rank's"),
        ({"stage": 2}, {"gradient_clipping": 1.0}, r"found 1.0; the run config says 0.5 \(optimizer.max_gradient_norm\)"),
        ({"stage": 3, "overlap_com": True}, {}, "overlap_com: found True; DeepSpeed refuses it .* Did you mean 'overlap_comm'"),
        ({"stage": 3, "sub_group_size": -1}, {}, "zero_optimization.sub_group_size: found -1; DeepSpeed refuses it"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, {}, "offload_param.device: found 'gpu'; DeepSpeed refuses it"),
    ],
)
def test_what_deepspeed_would_end_at_is_refused_by_its_key(
    folder: Path, zero: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_deepspeed_config(with_json(folder, zero, **changes))
