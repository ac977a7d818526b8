"""The miniature study from its file to its report: on a real Slurm cluster of two nodes, or, said loudly, on this machine alone.

ZeRO-3 over two nodes. One run is preempted in the middle and must end as one that never was; one fails on purpose, is shown with
its reason, and is mended and submitted again; what is submitted twice starts once.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from hybrid_scale.config import RunConfig, dump_config
from hybrid_scale.data.records import Judgment, Passage, Query
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.study.grid import Plan, plan_study
from tests.data.synthetic import parallel
from tests.study.jobs.clusters import ROOT, Cluster, Here, cluster, environment, wait

MINIATURE = ROOT / "launch" / "configs" / "study_miniature.yaml"
SIZES = {"0.1m": (16, 1), "1m": (128, 3)}
"""Hidden size and layers in this test: smaller than the miniature's own, as all starts share two cores. The last is slow enough
to be preempted."""
STEPS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def way() -> Iterator[Here]:
    with cluster(environment()) as found:
        yield found


def write_inputs(folder: Path) -> None:
    pairs = parallel(folder / "train", groups=60)
    languages = ("en", "de", "zh")
    records = [Passage("made", f"{n}:{lang}", lang, f"text of g{n}:{lang}") for n in range(20) for lang in languages]
    asked = [Query("made", f"q{n}:{lang}", lang, f"question about g{n}", f"g{n}") for n in range(20) for lang in languages]
    judged = [Judgment("made", query.id, f"{query.id[1:].split(':')[0]}:{lang}", 1) for query in asked for lang in languages]
    write_retrieval([*records, *asked, *judged], folder / "later", {"name": "made"})
    texts = pairs.queries.column("text") + pairs.passages.column("text")
    for name, (hidden, layers) in SIZES.items():
        tokenizer = write_tokenizer(texts, folder / f"mini-{name}", vocabulary=300)
        write_model(folder / f"mini-{name}", len(tokenizer), hidden, layers, heads=2)


def write_study(folder: Path) -> Path:
    """The miniature study with this test's folders, one arm, and weights that are really shared among the ranks."""
    tree = yaml.safe_load(MINIATURE.read_text(encoding="utf-8"))
    zero = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(zero))
    tree["study"]["directory"] = str(folder / "out")
    tree["base"]["data"]["train"] = str(folder / "train")
    tree["base"]["training"].update(deepspeed=str(folder / "zero3.json"), max_steps=STEPS)
    tree["base"]["sampler"].update(global_batch=32, pool_rows=4)
    tree["evaluate"] = [str(folder / "later")]
    tree["site"].update(account="lab", qos="normal", setup="echo set up by the site", container="nice -n 1", sbatch=["--nice=5"])
    tree["arms"] = [arm for arm in tree["arms"] if arm["name"] == "hybrid"]
    tree["site"]["time"] = "01:00:00"  # five minutes before it a run is told to save
    tree["models"] = [model for model in tree["models"] if model["name"] in SIZES]
    for model in tree["models"]:
        model["set"]["model.base"] = str(folder / f"mini-{model['name']}")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def reference(config: RunConfig, folder: Path) -> RunConfig:
    """The same run in another place, which nobody preempts."""
    place = config.run.model_copy(update={"directory": str(folder / "reference")})
    return config.model_copy(update={"run": place})


def logged(run: RunDirectory) -> int:
    metrics = run.metrics()
    return int(metrics[-1]["step"]) if metrics else 0


def trained(run: RunDirectory) -> dict[str, np.ndarray]:
    (file,) = (run.checkpoints / f"step_{STEPS:08d}" / "adapter").glob("*.safetensors")
    return load_file(file)


def words(plan: Plan) -> list[str]:
    return [str(RunDirectory(run.directory).status()["status"]) for run in plan.runs]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cluster_is_a_real_one(way: Here) -> None:
    """Skipped, with the reason, where the study below runs on this machine instead."""
    if way.reason:
        pytest.skip(f"no Slurm cluster here: {way.reason.splitlines()[-1]}")
    assert isinstance(way, Cluster)


def test_a_study_from_its_file_to_its_report(folder: Path, way: Here) -> None:
    write_inputs(folder)
    study = write_study(folder)
    plan = plan_study(study)
    first, last = (RunDirectory(run.directory) for run in plan.runs)
    shutil.move(folder / "mini-0.1m", folder / "kept")  # the failure on purpose: its base isn't there

    clock = [time.monotonic()]
    said = way.start(study)
    if isinstance(way, Cluster):
        assert said.count(": train is job ") == said.count(": evaluate is job ") == 2
        assert said.count("study: collect is job ") == 1
        assert " is job " not in way.start(study), "a second submission starts nothing"
    whole = reference(plan.runs[1].config, folder)
    (folder / "reference.yaml").write_text(dump_config(whole))
    way.train(folder / "reference.yaml", 900) if isinstance(way, Cluster) else None

    wait("the steps before the preemption", lambda: logged(last) >= 1, 600)
    way.preempt(study)
    way.finish(900)
    clock.append(time.monotonic())
    if not isinstance(way, Cluster):
        way.train(folder / "reference.yaml", 900)
    check_equal(last, RunDirectory(whole.run.directory))

    shown = way.door("status", str(study))
    assert words(plan) == ["failed", "done"], shown.stdout
    if isinstance(way, Cluster):
        (log,) = plan.runs[1].directory.glob("slurm-train-*.log")
        assert log.read_text().count("set up by the site") >= 2, "one log over a preemption"
    assert shown.returncode == 1
    failed = shown.stdout.splitlines()[0]
    assert failed.startswith("0.1m.hybrid.seed-0  failed ")
    assert str(folder / "mini-0.1m") in failed, "the reason names what is missing"
    if isinstance(way, Cluster):
        assert "| evaluation blocked, 1 sets left" in failed
    assert (folder / "out" / "report.html").exists(), "an unfinished study is reported too"

    shutil.move(folder / "kept", folder / "mini-0.1m")
    said = way.again(study)
    if isinstance(way, Cluster):
        assert said.count(": train is job ") == said.count(": evaluate is job ") == 1
    way.finish(900)
    clock.append(time.monotonic())
    shown = way.door("status", str(study))
    assert shown.returncode == 0, shown.stdout
    assert "2 runs: 2 done" in shown.stdout
    assert shown.stdout.count("| evaluation done") == 2, shown.stdout
    assert logged(first) == STEPS
    check_results(plan, folder)
    print(way.name, [f"{after - before:.0f} s" for before, after in itertools.pairwise(clock)])


def check_equal(preempted: RunDirectory, whole: RunDirectory) -> None:
    """The preempted run went on from its checkpoint: every loss and weight is that of the run that went through."""
    starts = {record["step"] for record in preempted.metrics()}
    assert starts == set(range(1, STEPS + 1))
    assert len(list(preempted.checkpoints.glob("step_*"))) == 2, "one at the preemption, one at the end"
    assert [record["loss"] for record in preempted.metrics()] == [record["loss"] for record in whole.metrics()]
    ours, theirs = trained(preempted), trained(whole)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def check_results(plan: Plan, folder: Path) -> None:
    for run in plan.runs:
        result = read_json(RunDirectory(run.directory).evaluation_file("later"))
        assert (result["task"], result["queries"]) == ("later", 60)
        assert RunDirectory(run.directory).evaluation_file("later").with_suffix(".parquet").exists()
        assert json.loads((run.directory / "manifest.json").read_text())["world_size"] == 2
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert all(run.id in page for run in plan.runs)
