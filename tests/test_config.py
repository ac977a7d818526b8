"""The config: strict, frozen, and clear about what is wrong."""

from pathlib import Path

import pytest

from hybrid_scale.config import RunConfig, apply_overrides, dump_config, load_config, parse_yaml, validate
from hybrid_scale.errors import ConfigError

MINIMAL = {"data": {"train": "data"}, "model": {"base": "base"}, "training": {"max_steps": 10}}


def changed(**sections) -> dict:
    return {**MINIMAL, **{name: {**MINIMAL.get(name, {}), **values} for name, values in sections.items()}}


def refusal(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, tree, "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(model={"polling": "mean"}), "run.yaml: model.polling: found 'mean'; unknown key. Did you mean 'pooling'?"),
        (changed(model={"lora": {"rnk": 4}}), "run.yaml: model.lora.rnk: found 4; unknown key. Did you mean 'rank'?"),
        ({**MINIMAL, "sampling": {}}, "run.yaml: sampling: found {}; unknown key. Did you mean 'sampler'?"),
        (changed(training={"max_steps": "10"}), "run.yaml: training.max_steps: found '10'; input should be a valid integer."),
        (changed(training={"max_steps": True}), "run.yaml: training.max_steps: found True; input should be a valid integer."),
        (changed(sampler={"alpha": 1.2}), "run.yaml: sampler.alpha: found 1.2; input should be less than or equal to 1."),
        (
            changed(sampler={"arm": "both"}),
            "run.yaml: sampler.arm: found 'both'; input should be 'mono', 'cross', 'hybrid' or 'mixed'.",
        ),
        (
            {"model": {"base": "b"}, "training": {"max_steps": 1}},
            "run.yaml: data: found 'nothing'; this key is required. Set it.",
        ),
        (
            changed(sampler={"alpha": 0.3}),
            "run.yaml: sampler.alpha: found 0.3; alpha must give a whole number of mono pools among the 4 of a batch, and"
            " 0.3 x 4 = 1.2 is not one. Change alpha, sampler.pool_rows or sampler.global_batch.",
        ),
        (
            changed(sampler={"composition": "scheduled", "alpha": 0.3, "window_steps": 7}),
            "sampler.alpha: found 0.3; alpha must give a whole number of mono steps in a window of 7, and 0.3 x 7 = 2.1 is not",
        ),
        (
            changed(sampler={"pool_rows": 12}),
            "sampler.pool_rows: found 12; a global batch must be a whole number of pools, and 64 rows are not. Use a divisor of"
            " 64, or another sampler.global_batch.",
        ),
        (
            changed(sampler={"composition": "scheduled", "pool_rows": 16}),
            "sampler.pool_rows: found 16; a scheduled batch is one pool, so this must equal sampler.global_batch = 64.",
        ),
        (
            changed(sampler={"mono_block_rows": 32}),
            "sampler.mono_block_rows: found 32; this key is gone: pools of every arm now have one size, so that all rows meet"
            " equally many negatives. Write sampler.pool_rows: 32 instead.",
        ),
        (
            changed(model={"quantization": "nf4", "lora": None}),
            "model.lora: found None; 4-bit weights can't be trained themselves.",
        ),
        (changed(model={"lora": None}), "model.dtype: found 'bfloat16'; full fine-tuning updates the weights themselves"),
        (changed(loss={"denominator": "hard_only"}), "loss.denominator: found 'hard_only'; needs hard negatives."),
        (changed(optimizer={"warmup_steps": 10}), "optimizer.warmup_steps: found 10; must be below training.max_steps = 10."),
        (
            changed(training={"max_tokens_per_micro_batch": 100}),
            "training.max_tokens_per_micro_batch: found 100; one text may have 256",
        ),
        (
            changed(
                training=dict.fromkeys(("max_tokens_per_micro_batch", "max_tokens_per_embedding_batch"), "auto"),
                data={"max_passage_tokens": 20_000},
            ),
            "training.max_tokens_per_embedding_batch: found 16384; one text may have 20000 tokens. Raise it, or lower",
        ),
        (
            changed(optimizer={"learning_rate": float("nan")}),
            "run.yaml: optimizer.learning_rate: found nan; a number must be finite. Put it in quotes, where it is meant as",
        ),
        (changed(loss={"chunk_rows": 64}), "loss.chunk_rows: found 64; this key of an older version is gone. Leave it out, or"),
        (changed(evaluation={"store_embeddings": True}), "evaluation.store_embeddings: found True; this key of an older version"),
        (changed(model={"revision": float("inf")}), "model.revision: found inf; a number must be finite. Put it in quotes"),
        (changed(model={"revision": ""}), "model.revision: found ''; string should have at least 1 character."),
        (changed(model={"query_prompt": None}), 'model.query_prompt: found None; input should be a valid string. Write "" for'),
        (changed(run={"name": 1234567}), "run.name: found 1234567; input should be a valid string. Put it in quotes."),
        (changed(model={"base": 7.5}), "model.base: found 7.5; input should be a valid string. Put it in quotes."),
    ],
)
def test_message(tree, message):
    assert message in refusal(tree)


def test_sets_for_curves_are_scored_on_the_way_and_the_others_at_the_end() -> None:
    data = {"train": "t", "evaluate": ["a", "b"], "evaluate_during": ["dev", "b"]}
    tree = {"data": data, "model": {"base": "x"}, "training": {"max_steps": 4, "evaluate_every_steps": 2}}
    found = validate(RunConfig, tree, "test").data
    assert [found.scored_at(step) for step in (0, 2, None)] == [("a", "b", "dev"), ("dev", "b"), ("a", "b", "dev")]
    plain = validate(RunConfig, {**tree, "data": {**data, "evaluate_during": []}}, "test").data
    assert [plain.scored_at(step) for step in (0, 2, None)] == [("a", "b")] * 3
    with pytest.raises(ConfigError, match=r"scored every training\.evaluate_every_steps"):
        validate(RunConfig, {**tree, "training": {"max_steps": 4}}, "test")


def test_every_mistake_is_listed_at_once():
    message = refusal(changed(model={"polling": "x"}, sampler={"alpha": -1}))
    assert "model.polling" in message
    assert "sampler.alpha" in message


def test_dump_reads_back_to_an_equal_object():
    config = validate(RunConfig, changed(model={"lora": {"targets": ["q_proj", "v_proj"]}}), "x")
    assert validate(RunConfig, parse_yaml(dump_config(config), "x"), "x") == config


def test_config_is_frozen():
    config = validate(RunConfig, MINIMAL, "x")
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]


def test_overrides_are_read_as_yaml(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: d}\nmodel: {base: b}\ntraining: {max_steps: 5}\n")
    config = load_config(
        path, ["optimizer.learning_rate=1e-3", "model.lora.rank=4", "data.evaluate=[a, b]", "training.max_steps=7"]
    )
    assert config.optimizer.learning_rate == 0.001
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert config.data.evaluate == ("a", "b")
    assert config.training.max_steps == 7


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.query_prompt=", ""),
        ("model.query_prompt=Query: ", "Query: "),
        ('model.query_prompt="Query: "', "Query: "),
        ("model.query_prompt=''", ""),
        ("model.query_prompt='a' and 'b", "'a' and 'b"),
        ("model.query_prompt=null", "null"),
        ("model.query_prompt=[a, {b", "[a, {b"),
        ("model.query_prompt=k=v # no comment", "k=v # no comment"),
        ("model.revision=61e9540", "61e9540"),
        ("model.revision=1234567", "1234567"),
        ("model.revision=0x1f", "0x1f"),
        ("model.revision=12:30", "12:30"),
        ("model.revision=null", None),
        ("model.revision=~", None),
        ("run.name=007", "007"),
        ("run.name=no", "no"),
        ("model.base=1e5", "1e5"),
        ("sampler.languages=[no, en]", ("no", "en")),
        ("data.evaluate=[007, 2024-01-02]", ("007", "2024-01-02")),
        ("model.lora.targets=[1, null]", ("1", "null")),
        ("model.lora.targets=all-linear", "all-linear"),
        ("training.keep_best=off:map", "off:map"),
    ],
)
def test_a_text_is_taken_as_it_was_typed(override, value):
    tree = changed(data={"evaluate": ["off"]})
    config = validate(RunConfig, apply_overrides(tree, [override], RunConfig), "x")
    found: object = config
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_what_is_no_text_is_read_as_yaml():
    given = ["training.max_steps=1_000", "model.lora=null", "sampler.alpha=1e-1", "training.stop_at=2030-01-31", "no.such=1"]
    tree = apply_overrides(MINIMAL, given, RunConfig)
    assert tree["training"] == {"max_steps": 1000, "stop_at": "2030-01-31"}
    assert (tree["model"]["lora"], tree["sampler"]["alpha"], tree["no"]) == (None, 0.1, {"such": 1})


@pytest.mark.parametrize("override", ["novalue", "=3", "a..b=3", "training.max_steps.deep=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="override"):
        apply_overrides(MINIMAL, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "x: line 2: found 'a'; the key stands twice in one section."),
        ("a: [1\n", "x:2: not YAML"),
        ("- 1\n", "a config is a mapping of sections"),
    ],
)
def test_broken_yaml(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x")
    assert message in str(caught.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Path("absent.yaml"))


def test_shipped_configs_are_valid():
    """Every run in launch/configs is accepted; studies (and their runs) and sites are checked in tests/study."""
    folder = Path(__file__).resolve().parent.parent / "launch" / "configs"
    runs = [path for path in folder.glob("*.yaml") if "run" in parse_yaml(path.read_text(), path.name)]
    assert len(runs) >= 2
    for path in runs:
        load_config(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: é\n".encode("utf-16"), r"x.yaml:1: found b'\\xff'; a config is text in UTF-8"),
        (b"a: 1\nb: \xe9\n", r"x.yaml:2: found b'\\xe9'; a config is text in UTF-8"),
        (b"{[1, 2]: 3}\n", "line 1: found .*; a key is a word"),
        (b"a: &x [*x]\n", "a value isn't a plain number"),
        (b"a: .inf\n", "a: found inf; a number must be finite"),
        (b"a: [1, {b: 61e9540}]\n", r"x.yaml: a.1.b: found inf; a number must be finite. Put it in quotes"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, said):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "x.yaml")


def test_a_text_of_other_bytes_is_refused():
    with pytest.raises(ConfigError, match="a text must be in UTF-8"):
        apply_overrides(MINIMAL, ["model.query_prompt=\udce9"], RunConfig)


@pytest.mark.parametrize("override", ["a.b=[", 'a.b="x', "a.b=*x", "a.b=\udce9"])
def test_overrides_that_are_not_yaml(tmp_path, override):
    (tmp_path / "x.yaml").write_text("a: {b: 1}\n")
    with pytest.raises(ConfigError, match=r"^override '.*': not YAML: ") as caught:
        load_config(tmp_path / "x.yaml", [override])
    str(caught.value).encode()


def test_norwegian_needs_quotes():
    with pytest.raises(ConfigError, match=r"sampler.languages.0: found False; .* Put it in quotes."):
        validate(RunConfig, changed(sampler={"languages": [False]}), "x")


def test_a_scheduled_batch_is_one_pool():
    config = validate(RunConfig, changed(sampler={"composition": "scheduled", "global_batch": 48}), "run.yaml")
    assert (config.sampler.pool_rows, config.sampler.pools_per_batch, config.negatives_a_row) == (48, 1, 47)
    assert validate(RunConfig, parse_yaml(dump_config(config), "run.yaml"), "run.yaml") == config


@pytest.mark.parametrize(
    ("sampler", "loss", "negatives"),
    [
        ({"global_batch": 64, "pool_rows": 16}, {}, 15),
        ({"global_batch": 64, "pool_rows": 16, "hard_negatives": 3}, {}, 63),
        ({"global_batch": 64, "pool_rows": 16, "hard_negatives": 3}, {"denominator": "hard_only"}, 48),
    ],
)
@pytest.mark.parametrize("arm", ["mono", "cross", "hybrid", "mixed"])
def test_negatives_a_row_dont_depend_on_the_arm(arm, sampler, loss, negatives):
    config = validate(RunConfig, changed(sampler={"arm": arm, **sampler}, loss=loss), "run.yaml")
    assert config.negatives_a_row == negatives
