"""DeepSpeed JSONs: where they are found, what is read of them, what is refused and at which place."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.config import RunConfig, validate
from hybrid_scale.errors import ConfigError
from hybrid_scale.planning.zero import bucket_sizes, json_file, place, read_json, read_zero

ROOT = Path(__file__).resolve().parents[2]


def config(path: Path | str) -> RunConfig:
    tree = {"data": {"train": "d"}, "model": {"base": "b"}, "training": {"max_steps": 1, "deepspeed": str(path)}}
    return validate(RunConfig, tree, "test")


def written(folder: Path, content: Any) -> RunConfig:
    path = folder / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return config(path)


def published(**changes: Any) -> dict[str, Any]:
    """The keys that published ZeRO-3 files have, every one of them that may be "auto" left so."""
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    tree: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": "auto", "auto_cast": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            **{"stage": 3, "overlap_comm": True, "sub_group_size": 1e9, **dict.fromkeys(buckets, "auto")},
            **{"stage3_max_live_parameters": 1e9, "stage3_gather_16bit_weights_on_model_save": "auto"},
        },
    }
    return {**tree, **changes}


def refusal(folder: Path, content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_json(written(folder, content))
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(f"{folder}/", "")


# Where


def test_a_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert json_file(config("ds_configs/zero2.json")) == Path("ds_configs/zero2.json")
    assert place(config("ds_configs/zero2.json")) == "ds_configs/zero2.json"
    monkeypatch.chdir(tmp_path)
    assert json_file(config("ds_configs/zero2.json")) == ROOT / "ds_configs" / "zero2.json"
    expected = "zero2.json (that of the checkout: there is no ds_configs/zero2.json in the working directory)"
    assert place(config("ds_configs/zero2.json")).endswith(expected)
    own = tmp_path / "ds_configs" / "zero2.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert json_file(config("ds_configs/zero2.json")) == Path("ds_configs/zero2.json")


def test_an_absent_file_names_both_places_and_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        json_file(config("ds_configs/zero4.json"))
    said = str(caught.value)
    assert said.startswith(f"training.deepspeed: found 'ds_configs/zero4.json'; no such file in {tmp_path} nor in {ROOT}.")
    assert "ds_configs/zero3_offload.json" in said


# What


def test_a_published_file_is_read(tmp_path: Path) -> None:
    run = written(tmp_path, published())
    settings = read_json(run)
    assert settings["bf16"] == settings["fp16"] == {"enabled": False}
    assert "train_batch_size" not in settings
    zero = read_zero(run, hidden=4096)
    assert (zero.stage, zero.group) == (3, None)
    assert (zero.buffers.live, zero.buffers.prefetch, zero.buffers.reduce) == (1e9, 15_099_494, 16_777_216)


def test_bucket_sizes_are_those_of_transformers() -> None:
    found = bucket_sizes(3584)  # 3584^2, 0.9 of it cut to a whole number, 10 x 3584
    assert list(found.values()) == [12_845_056, 11_560_550, 35_840]


def test_offload_and_stated_sizes_are_read(tmp_path: Path) -> None:
    stated = {"stage": 3, "stage3_max_live_parameters": 7e8, "reduce_bucket_size": 5, "offload_param": {"device": "cpu"}}
    found = read_zero(written(tmp_path, {"zero_optimization": {**stated, "offload_optimizer": {"device": "none"}}}), 32)
    assert (found.stage, found.buffers.live, found.buffers.reduce, found.buffers.prefetch) == (3, 7e8, 5, 5e7)
    assert (found.offloads_weights, found.offloads_optimizer) == (True, False)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert read_json(written(tmp_path, "\ufeff" + json.dumps(published())))["gradient_clipping"] == "auto"


# What not


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "a": 1,\n}', "zero.json:3: found '}'; must be JSON: "),
        ('{\n // stage\n "a": 1}', "zero.json:2: found '// stage'; must be JSON: "),
        ('{\n "a": 1\n "b": 2}', "zero.json:3: found '\"b\": 2}'; must be JSON: Expecting ',' delimiter."),
        ("", "zero.json:1: found ''; must be JSON: "),
        ("[]", "zero.json:1: found []; must be a mapping, {...}, at the top."),
        ('"zero3"', "zero.json:1: found 'zero3'; must be a mapping"),
        ('{"a": {"stage": 2, "stage": 3}}', "zero.json: found 'stage'; the key stands twice in one section."),
        ("{}", "zero.json: zero_optimization: found None; must be a section with ZeRO's stage."),
        ('{"zero_optimization": true}', "zero.json: zero_optimization: found True; must be a section"),
        ('{"zero_optimization": {}}', "zero.json: zero_optimization.stage: found None; must be 1, 2, 3 or"),
        ('{"zero_optimization": {"stage": 0}}', 'zero_optimization.stage: found 0; must be 1, 2, 3 or "auto". A copy of'),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage: found '3'; must be"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage: found True; must be"),
    ],
)
def test_broken_files_are_told_by_their_place(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "zero.json: optimizer: found {'type': 'AdamW'"),
        ({"scheduler": {"type": "WarmupLR"}}, "zero.json: scheduler: found {'type': 'WarmupLR'}; the schedule is the run"),
        ({"train_batch_size": 64}, "train_batch_size: found 64; the global batch is the run config's."),
        ({"bf16": {"enabled": True}}, "bf16.enabled: found True; the types of a run are model.dtype's"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: found True; the types of a run"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp.enabled: found True"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: found True"),
        (
            {"zero_optimization": {"stage": 3, "overlap_comm": "auto"}},
            "zero_optimization.overlap_comm: found 'auto'; nobody fills",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
            "zero_optimization.offload_optimizer.device: found 'auto'; nobody fills this key here. Write a value, or leave it",
        ),
    ],
)
def test_what_the_run_says_itself_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, published(**changes))


def test_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(b'{\n"a": "\xe9"}')
    with pytest.raises(ConfigError, match=r"zero.json:2: found b'\\xe9'; must be text in UTF-8"):
        read_json(config(path))


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 3, "reduce_bucket_size": "5e8"}, "zero_optimization.reduce_bucket_size: found '5e8'; must be a number"),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, "zero_optimization.zero_hpz_partition_size: found '8'; must be a number"),
        ({"stage": 3, "offload_param": "cpu"}, "zero_optimization.offload_param: found 'cpu'; must be a section"),
    ],
)
def test_sizes_are_numbers(tmp_path: Path, zero: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_zero(written(tmp_path, {"zero_optimization": zero}), 32)
