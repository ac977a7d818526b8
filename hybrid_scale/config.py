"""Every setting of a run, with its unit and its check: YAML + overrides -> one frozen object.

Refuses to do work: no file but the YAML is opened, no library is loaded, nothing is derived that needs data.
"""

import copy
import datetime
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hybrid_scale.errors import ConfigError, describe, nearest
from hybrid_scale.languages import distinct_codes

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TokenBudget = Literal["max_tokens_per_micro_batch", "max_kept_tokens", "max_tokens_per_embedding_batch"]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """A strict, frozen group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._=-]+$")] = "run"
    directory: str = "runs/run"
    """Where this run lives; created if absent, continued if its config agrees, else refused."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class DataSettings(Section):
    train: str
    """Prepared pairs (`launch/prepare.py`)."""
    evaluate: tuple[str, ...] = ()
    """Prepared retrieval sets, scored at the end; also every `training.evaluate_every_steps` where `evaluate_during` is empty."""
    evaluate_during: tuple[str, ...] = ()
    """Small development sets for learning curves: scored in place of those every `training.evaluate_every_steps`, and at the
    end."""
    max_query_tokens: Positive = 64
    max_passage_tokens: Positive = 256
    """Longest query and passage of the training in tokens, prompt and end token included; longer texts are cut and counted.
    What is scored is cut elsewhere: `evaluation.max_query_tokens`, `evaluation.max_passage_tokens`."""

    @property
    def scored(self) -> tuple[str, ...]:
        """Every set that the run scores by itself, once."""
        return tuple(dict.fromkeys((*self.evaluate, *self.evaluate_during)))

    def scored_at(self, step: int | None) -> tuple[str, ...]:
        """The sets that are scored after `step` steps; None: at the end."""
        return self.scored if step in (None, 0) else self.evaluate_during or self.evaluate


class SamplerSettings(Section):
    arm: Literal["mono", "cross", "hybrid", "mixed"] = "hybrid"
    alpha: Share = 0.5
    """Share of monolingual rows (`composed`) or batches (`scheduled`); read by the arm `hybrid` alone."""
    composition: Literal["composed", "scheduled"] = "composed"
    draws: Literal["quota", "independent"] = "quota"
    """`quota`: kinds and languages exact over each window; `independent`: drawn step by step, as in 2408.10536."""
    window_steps: Positive = 20
    """Length of the window over which `scheduled` + `quota` keeps alpha exact."""
    global_batch: Positive = 64
    """Rows (query, positive passage) of one optimiser step, over all ranks."""
    pool_rows: Positive = 16
    """Rows of one contrastive pool, in every arm, so that a row of any arm meets the same number of negatives. A `composed`
    batch is a whole number of pools; a `scheduled` batch is one pool, so this must equal `global_batch` (left out, it does)."""
    language_weights: Literal["uniform", "size", "power"] = "uniform"
    power: Share = 0.5
    """Exponent t of `language_weights: power` (weight = pairs^t; cross pairs count for the language of their query)."""
    languages: tuple[str, ...] = ()
    """Languages to train on, in any spelling of their codes (`hybrid_scale/languages.py`); empty: all in the data."""
    allow_same: bool = False
    """LAReQA's X-Y variant: a cross row may also pair equal languages."""
    hard_negatives: NonNegative = 0
    """Hard negatives a row; every row used must have that many."""
    conflicts: Literal["forbid", "mask"] = "forbid"
    """Two rows of one pool with a common parallel group or passage: `forbid` (error if a pool can't be filled) or
    `mask` (allowed, masked in the loss)."""

    @field_validator("languages")
    @classmethod
    def _one_code_each(cls, spellings: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(distinct_codes("sampler.languages", spellings, ConfigError))

    @property
    def mono_share(self) -> float:
        return {"mono": 1.0, "cross": 0.0, "hybrid": self.alpha, "mixed": 0.0}[self.arm]

    @property
    def pools_per_batch(self) -> int:
        """Contrastive pools of one global batch."""
        return self.global_batch // self.pool_rows

    @property
    def mono_pools(self) -> int:
        """Monolingual pools of one `composed` batch."""
        return round(self.mono_share * self.pools_per_batch)

    @model_validator(mode="after")
    def _pools_and_ratio_are_whole(self) -> Self:
        if self.composition == "scheduled" and self.pool_rows != self.global_batch:
            rule = f"a scheduled batch is one pool, so this must equal sampler.global_batch = {self.global_batch}"
            raise ConfigError(describe("sampler.pool_rows", self.pool_rows, rule, "Leave it out, or use composition: composed."))
        if self.global_batch % self.pool_rows:
            rule = f"a global batch must be a whole number of pools, and {self.global_batch} rows are not"
            remedy = f"Use a divisor of {self.global_batch}, or another sampler.global_batch."
            raise ConfigError(describe("sampler.pool_rows", self.pool_rows, rule, remedy))
        if self.arm != "mixed" and (self.composition == "composed" or self.draws == "quota"):
            self._refuse_a_broken_ratio()
        return self

    def _refuse_a_broken_ratio(self) -> None:
        composed = self.composition == "composed"
        count = self.pools_per_batch if composed else self.window_steps
        mono = self.mono_share * count
        if abs(mono - round(mono)) <= 1e-9:
            return
        what = f"mono pools among the {count} of a batch" if composed else f"mono steps in a window of {count}"
        rule = f"alpha must give a whole number of {what}, and {self.alpha} x {count} = {mono:g} is not one"
        keys = "sampler.pool_rows or sampler.global_batch" if composed else "sampler.window_steps"
        raise ConfigError(describe("sampler.alpha", self.alpha, rule, f"Change alpha, {keys}."))


class LoraSettings(Section):
    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    compute: Literal["model", "float32"] = "model"
    """Type of the adapter's products: that of the model around it, or float32. The weights are float32 either way."""


class ModelSettings(Section):
    base: str
    """Folder or Hugging Face id of a decoder with its tokenizer."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    trust_remote_code: bool = False
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: bitsandbytes 4-bit with double quantisation; needs `lora`."""
    dtype: Literal["float64", "float32", "bfloat16"] = "bfloat16"
    """Type of the frozen (or, without LoRA, trained) weights and of all products; LoRA's own weights are at least float32.
    float64: for tests of exactness."""
    lora: LoraSettings | None = LoraSettings()
    """`null`: full fine-tuning."""
    attention: Literal["causal", "bidirectional"] = "causal"
    attention_implementation: Literal["packed", "sdpa", "eager", "flash_attention_2"] = "packed"
    """`packed` (torch's attention, text by text) and `flash_attention_2` (varlen) put texts end to end without padding;
    `sdpa` and `eager` pad each micro-batch to its longest text."""
    pooling: Literal["last", "mean", "weighted_mean"] = "last"
    """`weighted_mean`: position-weighted (SGPT, 2202.08904)."""
    query_prompt: str = "Query: "
    passage_prompt: str = "Passage: "
    end_token: str | None = None
    """Token appended to each text; null: what the tokenizer itself appends, or its `eos_token` where it appends nothing."""
    gradient_checkpointing: bool = True

    @property
    def packed(self) -> bool:
        """Whether texts are put end to end instead of padded."""
        return self.attention_implementation in ("packed", "flash_attention_2")

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> Self:
        if self.lora is None and self.quantization == "none" and self.dtype == "bfloat16":
            raise ConfigError(
                describe(
                    "model.dtype",
                    self.dtype,
                    "full fine-tuning updates the weights themselves, too small for bfloat16",
                    "Set model.dtype: float32, or train LoRA.",
                )
            )
        if self.quantization == "nf4" and self.lora is None:
            raise ConfigError(
                describe(
                    "model.lora", None, "4-bit weights can't be trained themselves", "Set model.lora, or quantization: none."
                )
            )
        return self


class LossSettings(Section):
    temperature: PositiveFloat = 0.02
    denominator: Literal["in_batch", "hard_only"] = "in_batch"
    """`in_batch`: positives and hard negatives of the row's pool; `hard_only`: the row's positive and the pool's hard
    negatives, as printed in 2408.10536."""
    false_negative_margin: Annotated[float, Field(ge=0.0)] | None = None
    """Drop negatives that score above the positive by more than this (0.1 in 2506.05176); null: off."""
    max_logits: Positive = 16_777_216
    """Scores held at once on a rank, in elements: rows are taken in chunks of `max_logits` / columns of their pool."""
    exchange: Literal["float32", "bfloat16"] = "float32"
    """Type in which ranks exchange embeddings; their gradients are exchanged in float32."""


class OptimizerSettings(Section):
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    epsilon: PositiveFloat = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    max_gradient_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Clipping threshold; 0: none."""


class TrainingSettings(Section):
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """`plain`: no DeepSpeed, a replica per rank; the reference that the tests compare with."""
    deepspeed: str = "ds_configs/zero3.json"
    max_steps: Positive
    passes: Literal["auto", "direct", "two_pass"] = "auto"
    """`direct`: every text goes through the model once, an error where that exceeds `max_kept_tokens`; `two_pass`:
    cached gradients, every text twice; `auto`: keep the graphs of as many micro-batches as `max_kept_tokens` allows,
    embed only the rest twice."""
    max_tokens_per_micro_batch: Positive = 4096
    """Tokens of one micro-batch with gradients, padding included. `auto`, here and for the two below: see `planned`."""
    max_kept_tokens: Positive | None = None
    """Tokens whose graphs a rank holds at once; null: `max_tokens_per_micro_batch`, which costs no memory of its own.
    With `model.gradient_checkpointing` a kept token costs only the inputs of the layers."""
    max_tokens_per_embedding_batch: Positive = 16384
    """Tokens of one micro-batch without gradients (first pass, evaluation), padding included."""
    planned: tuple[TokenBudget, ...] = ()
    """Token budgets that the planner sets when the run starts, the fastest that fit the GPUs it finds; `KEY: auto` says the
    same. Their numbers above serve only where nothing is planned: evaluation by a door of its own."""
    offload_activations: bool = False
    """Hold what kept graphs save (with checkpointing: the layers' inputs) in host memory."""
    shard_group: Positive | Literal["auto"] | None = None
    """GPUs that share one copy of the weights, for a DeepSpeed JSON that says "auto" there (ds_configs/zero_auto.json);
    1: a replica a GPU; "auto": the smallest of 1, 2, 4, ..., node, all that fits, or with planned token budgets the fastest."""
    gpu_memory_gib: PositiveFloat | None = None
    """For what is "auto": memory of a GPU, instead of asking this machine's. Needed where there is none."""
    log_every_steps: Positive = 1
    save_every_steps: Positive | None = None
    """Null: at the end only."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] | None = None
    """SET:METRIC of the evaluations (`xquad_r:multi_map`): the checkpoint that scored best is kept too, and each evaluation
    during training has one."""
    evaluate_every_steps: Positive | None = None
    """Null: at the end only."""
    resume_despite: tuple[Literal["data", "config", "model"], ...] = ()
    """Parts of the run that may differ from its checkpoint's."""
    stop_at: PositiveFloat | str | None = None
    """When this job will be ended: unix seconds, or ISO (local time without an offset). HS_STOP_AT and Slurm's
    SLURM_JOB_END_TIME say the same; the earliest counts."""
    stop_minutes_before: Annotated[float, Field(ge=0.0)] = 5.0
    """Minutes before that at which the run saves and stops as if signalled: longer than a step and a checkpoint."""
    rank_timeout_seconds: PositiveFloat = 600.0
    """Longest silence of a rank, and longest time within one step, before the other ranks give up."""
    trackers: tuple[str, ...] = ()
    """Names of Accelerate trackers (`tensorboard`, `wandb`, ...)."""

    @field_validator("planned")
    @classmethod
    def _each_once(cls, keys: tuple[TokenBudget, ...]) -> tuple[TokenBudget, ...]:
        return tuple(key for key in get_args(TokenBudget) if key in keys)

    @model_validator(mode="after")
    def _stop_is_a_time(self) -> Self:
        if self.stop_at is not None:
            unix_time("training.stop_at", self.stop_at)
        return self


def unix_time(key: str, value: float | str) -> float:
    """Unix seconds of a number, of its digits, or of an ISO time (local without an offset). Raises ConfigError."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return datetime.datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        remedy = "For example 2030-01-31T18:00:00+01:00."
        raise ConfigError(describe(key, value, "neither unix seconds nor an ISO time", remedy)) from None


EVALUATION_TOKENS = 512
"""Where published results on BEIR cut queries and passages (2104.08663, its appendix on models)."""


class EvaluationSettings(Section):
    max_query_tokens: Positive | None = None
    max_passage_tokens: Positive | None = None
    """Longest query and passage that is scored, in tokens, prompt and end token included: whatever the training cut, a set
    scores as published. None: EVALUATION_TOKENS, or as many as the base takes where they are fewer."""
    top_k: Annotated[int, Field(ge=10)] = 100
    embedding_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type in which passages are stored and searched. Queries stay float32."""
    shard_memory_gib: PositiveFloat = 4.0
    """A rank's share of a stored corpus is held in memory up to this size; a larger one is read from disk in blocks that,
    with their float32 copies, stay below half of it."""
    before_training: bool = False
    """Also score the untrained model, as step 0."""
    subtract_language_means: bool = False
    """Score the untrained and the final model's vectors once more with the mean of each language taken away, which needs no
    training: `without_language_means` of the result, a reference of the study's report."""


class RunConfig(Section):
    """One run, whole. Unknown keys, wrong types and contradictions are `ConfigError`s."""

    run: RunSettings = RunSettings()
    data: DataSettings
    sampler: SamplerSettings = SamplerSettings()
    model: ModelSettings
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def negatives_a_row(self) -> int:
        """Passages that a row's query is scored against, its positive left out, where no passage stands twice in the pool.

        Rows that share a family with it (`sampler.conflicts: mask`) and false negatives above the margin make them fewer.
        """
        hard = self.sampler.pool_rows * self.sampler.hard_negatives
        return hard if self.loss.denominator == "hard_only" else self.sampler.pool_rows - 1 + hard

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.loss.denominator == "hard_only" and self.sampler.hard_negatives == 0:
            raise ConfigError(
                describe("loss.denominator", "hard_only", "needs hard negatives", "Set sampler.hard_negatives to at least 1.")
            )
        longest = max(self.data.max_query_tokens, self.data.max_passage_tokens)
        # A planned number for passes without gradients is one that evaluation by itself takes: it must hold a text as well.
        planned = set(self.training.planned) - {"max_tokens_per_embedding_batch"}
        for key in ("max_tokens_per_micro_batch", "max_tokens_per_embedding_batch"):
            if key not in planned and getattr(self.training, key) < longest:
                raise ConfigError(
                    describe(
                        f"training.{key}",
                        getattr(self.training, key),
                        f"one text may have {longest} tokens",
                        "Raise it, or lower data.max_passage_tokens.",
                    )
                )
        if self.training.keep_best and not self.data.scored:
            raise ConfigError(describe("training.keep_best", self.training.keep_best, "needs a retrieval set in data.evaluate"))
        if self.data.evaluate_during and self.training.evaluate_every_steps is None:
            rule = "these sets are scored every training.evaluate_every_steps"
            raise ConfigError(
                describe("data.evaluate_during", list(self.data.evaluate_during), rule, "Set that number of steps.")
            )
        if self.optimizer.warmup_steps >= self.training.max_steps and self.optimizer.warmup_steps:
            raise ConfigError(
                describe(
                    "optimizer.warmup_steps",
                    self.optimizer.warmup_steps,
                    f"must be below training.max_steps = {self.training.max_steps}",
                )
            )
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and times as text (YAML 1.2) and refuses a key given twice (PyYAML keeps one)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise ConfigError(describe(f"line {line}", key, "a key is a word", "Put a text with brackets in quotes."))
            if key in seen:
                raise ConfigError(describe(f"line {line}", key, "the key stands twice in one section", "Keep one of them."))
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class _TextLoader(_Loader):
    """The same for lists of texts: 007, no and 1e5 stay as they were typed."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own class attribute)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError: missing, not YAML, not a mapping, a key twice."""
    if not path.is_file():
        raise ConfigError(describe(str(path), "no such file", "a config is a YAML file", "Check the path."))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.end]
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(describe(f"{path}:{line}", found, "a config is text in UTF-8", "Convert it.")) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    tree = _load_yaml(text, where)
    if not isinstance(tree, dict):
        raise ConfigError(describe(where, tree, "a config is a mapping of sections"))
    return tree


def _load_yaml(text: str, where: str, of_file: bool = True, loader: type[_Loader] = _Loader) -> Any:
    try:
        return yaml.load(text, loader)  # noqa: S506 (a SafeLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and of_file else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}{line}: not YAML: {problem}.") from None


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], kind: type[BaseModel] | None = None) -> dict[str, Any]:
    """A copy of `tree` with `section.key=value` set. Raises ConfigError on another form.

    The value is read as YAML, but where the setting of `kind` is a text it is taken as it was typed, whatever YAML makes of
    it: nothing is an empty text, 61e9540 and 007 are no numbers. Quotes around the whole text are not part of it.
    """
    result = copy.deepcopy(tree)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(describe("override", override, "must read section.key=value"))
        _set(result, keys, _value(text, f"override {override!r}", _type_at(kind, keys) if kind else None), override)
    return result


def with_settings(tree: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with values set by their dotted keys. Raises ConfigError where a key leads through a value."""
    result = copy.deepcopy(tree)
    for key, value in settings.items():
        _set(result, key.split("."), copy.deepcopy(value), key)
    return result


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any, said: str) -> None:
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(describe(f"override {'.'.join(keys)}", said, f"'{key}' is a value, not a section"))
    node[keys[-1]] = value


def _value(text: str, where: str, wanted: Any) -> Any:
    """What the text of an override says for a setting of the type `wanted`; None: unknown."""
    choices = _choices(wanted)
    texts = [choice for choice in choices if choice is not types.NoneType]
    if texts == [str]:
        if types.NoneType in choices and text in ("null", "~"):
            return None
        return _as_typed(text, where)
    if any(get_origin(choice) is tuple and get_args(choice)[:1] == (str,) for choice in choices):
        return _load_yaml(text, where, of_file=False, loader=_TextLoader)
    return _load_yaml(text, where, of_file=False)


def _as_typed(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(describe(where, text, "a text must be in UTF-8")) from None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return str(_load_yaml(text, where, of_file=False)) if quoted else text


def _choices(wanted: Any) -> list[Any]:
    """The members of a union, without what is noted of them."""
    if get_origin(wanted) is Annotated:
        return _choices(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        return [choice for member in get_args(wanted) for choice in _choices(member)]
    return [wanted]


def _type_at(kind: type[BaseModel], keys: Sequence[str]) -> Any:
    """The type of the setting at `keys`; None where there is no such setting."""
    wanted: Any = kind
    for key in keys:
        sections = [choice for choice in _choices(wanted) if isinstance(choice, type) and issubclass(choice, BaseModel)]
        mappings = [choice for choice in _choices(wanted) if get_origin(choice) is dict]
        if sections and key in sections[0].model_fields:
            wanted = sections[0].model_fields[key].annotation
        elif mappings:
            wanted = get_args(mappings[0])[1]
        else:
            return None
    return wanted


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """YAML file + overrides -> RunConfig. Raises ConfigError naming every offending key."""
    return validate(RunConfig, apply_overrides(read_yaml(path), overrides, RunConfig), str(path))


def validate(kind: type[S], tree: dict[str, Any], where: str) -> S:
    """`tree` as `kind`, in pydantic's strict JSON mode ("3" is no number, 1 no bool). Raises ConfigError."""
    try:
        tree = _with_pools(_planned(tree)) if issubclass(kind, RunConfig) else tree
        return kind.model_validate_json(_to_json(tree, where), strict=True)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def _planned(tree: dict[str, Any]) -> dict[str, Any]:
    """`training.KEY: auto` of a token budget -> `training.planned: [KEY]`."""
    training = tree.get("training")
    keys = [key for key in get_args(TokenBudget) if isinstance(training, dict) and training.get(key) == "auto"]
    if not isinstance(training, dict) or not keys:
        return tree
    stated = {key: value for key, value in training.items() if key not in keys}
    known = stated.get("planned") or []
    return {**tree, "training": {**stated, "planned": [*known, *keys] if isinstance(known, list) else known}}


def _with_pools(tree: dict[str, Any]) -> dict[str, Any]:
    """`sampler.pool_rows` of a scheduled batch that leaves it out. Raises ConfigError on the key that was there before it."""
    sampler = tree.get("sampler")
    if not isinstance(sampler, dict):
        return tree
    if "mono_block_rows" in sampler:
        rows = sampler["mono_block_rows"]
        rule = "this key is gone: pools of every arm now have one size, so that all rows meet equally many negatives"
        raise ConfigError(describe("sampler.mono_block_rows", rows, rule, f"Write sampler.pool_rows: {rows} instead."))
    if sampler.get("composition") != "scheduled" or "pool_rows" in sampler:
        return tree
    rows = sampler.get("global_batch", SamplerSettings.model_fields["global_batch"].default)
    return {**tree, "sampler": {**sampler, "pool_rows": rows}}


def _to_json(tree: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(tree, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        for key, value in _not_finite(tree) if isinstance(error, ValueError) and "Circular" not in str(error) else ():
            remedy = "Put it in quotes, where it is meant as a text."
            raise ConfigError(describe(key, value, "a number must be finite", remedy)) from None
        raise ConfigError(f"a value isn't a plain number, text, list or mapping: {error}.") from None


def _not_finite(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Infinite numbers of a tree, and those that are none, with their keys."""
    if isinstance(tree, float) and not math.isfinite(tree):
        yield path, tree
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, member in members:
        yield from _not_finite(member, f"{path}.{key}" if path else str(key))


GONE = {
    "loss.chunk_rows": "Leave it out, or bound the scores that a rank holds at once by loss.max_logits.",
    "evaluation.store_embeddings": "Leave it out: launch/evaluate.py keeps embeddings, evaluation during training doesn't.",
}
"""Settings of older versions, and what to write instead. What changed its meaning is told where it is read."""


def _explain(kind: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden" and key in GONE:
        return describe(key, problem["input"], "this key of an older version is gone", GONE[key])
    if problem["type"] == "extra_forbidden":
        return describe(key, problem["input"], "unknown key", nearest(path[-1], _fields_at(kind, path[:-1])))
    if problem["type"] == "missing":
        return describe(key, "nothing", "this key is required", "Set it.")
    remedy = ""
    if problem["type"] == "string_type" and problem["input"] is None:
        remedy = 'Write "" for an empty text.'
    elif problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
        # YAML 1.1, which PyYAML reads, takes no, off, yes and on for truth values (no is also Norwegian), 1234567 and
        # 12:30 for numbers.
        remedy = "Put it in quotes."
    return describe(key, problem["input"], problem["msg"][0].lower() + problem["msg"][1:], remedy)


def _fields_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the settings in the section at `path`."""
    for part in path:
        field = kind.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if sections:
            kind = sections[0]
    return list(kind.model_fields)


def dump_config(config: BaseModel) -> str:
    """Every setting, defaults included, as YAML that `load_config` reads back to an equal object."""
    tree = config.model_dump(mode="json")
    if isinstance(config, RunConfig):
        tree["training"] |= dict.fromkeys(tree["training"].pop("planned"), "auto")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
