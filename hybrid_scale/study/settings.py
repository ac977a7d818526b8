"""Every setting of a study file, with its check: axes, what a run gets of a cluster, how runs are started here, the site.

Refuses to expand anything: `grid` does that.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hybrid_scale.config import NonNegative, Positive, Section, Share

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")]
Dotted = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]


def _quoted(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('a time stands in quotes ("12:00:00"): YAML reads it as a number')
    return value


SlurmTime = Annotated[str, BeforeValidator(_quoted), Field(pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$")]
"""As sbatch takes it: minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
OWN_OPTIONS = {
    *("--job-name", "-J", "--dependency", "-d", "--array", "-a", "--clusters", "-M", "--wait", "-W"),
    *("--parsable", "--export", "--wrap", "--test-only"),
}
"""Options of sbatch that the submission gives or reads itself: another value, and jobs wouldn't be found again."""


def _not_ours(options: tuple[str, ...]) -> tuple[str, ...]:
    taken = [option for option in options if option.partition("=")[0] in OWN_OPTIONS]
    if taken:
        raise ValueError(f"{taken[0]} is given by the submission itself, which finds jobs again by it")
    return options


SlurmMemory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
HeldEqual = Literal[
    "data.train",
    "data.evaluate",
    "data.evaluate_during",
    "data.max_query_tokens",
    "data.max_passage_tokens",
    "evaluation.max_query_tokens",
    "evaluation.max_passage_tokens",
    "sampler.global_batch",
    "sampler.hard_negatives",
    "training.max_steps",
]

HELD_EQUAL: tuple[HeldEqual, ...] = get_args(HeldEqual)
"""What two runs must share, or their difference has more than one cause: the same data, global batches, triplets and steps for
every arm and every size."""


SetMetric = Annotated[
    str,
    Field(
        pattern=r"^[^:]+:(mono_map|cross_map|multi_map|(mono|cross)_r@1|multi_r@10|rank_distance|"
        r"ndcg@10|recall@100|mrr@10|mrr@100|map|r@1)$"
    ),
]
"""SET:METRIC, as in xquad_r:multi_map; the set by the name of its folder."""
PRIMARY_METRICS = (
    *(f"{name}:{metric}" for name in ("xquad_r", "mlqa_r") for metric in ("mono_map", "cross_map", "multi_map")),
    *("miracl:ndcg@10", "beir:ndcg@10", "nq:ndcg@10"),
)
"""The primary family's metrics where the study file names none, as far as the study evaluates their sets. `beir` is the mean
over the sets of BEIR."""


class PrimaryFamily(Section):
    """The claims that the study is for, named before its runs: one arm against others on few metrics, at the largest size and as
    a change between two sizes. The chance of a single false claim among all of them is held at 5 %; the rest is exploratory."""

    arm: Name | None = None
    """None: the hybrid arm, or of several that of alpha 0.5."""
    against: tuple[Name, ...] = ()
    """Names of arms. None: every arm of the types mono and cross."""
    metrics: tuple[SetMetric, ...] = ()
    """None: those of PRIMARY_METRICS whose sets are evaluated; without any, mono, cross and multi mAP of the sets in several
    languages and nDCG@10 of the others."""


def _groups(value: Any) -> Any:
    """A name that stands alone is a group of one."""
    if not isinstance(value, list):
        return value
    return tuple((each,) if isinstance(each, str) else tuple(each) if isinstance(each, list) else each for each in value)


class Within(Section):
    """`arm` scores at most `points` below each arm of `of`, hence below the better one."""

    arm: Name
    of: Annotated[tuple[Name, ...], Field(min_length=1)]
    points: Annotated[float, Field(gt=0, lt=1)]
    """In units of the metric: 0.01 is one point of mAP or nDCG as papers print them."""


class Prediction(Section):
    """What the authors expect of the scores, written down before the runs. The report says of each whether it holds."""

    says: Annotated[str, Field(min_length=1)]
    """The expectation in words, and where it comes from."""
    metrics: Annotated[tuple[SetMetric, ...], Field(min_length=1)]
    """It is judged on each of them, at each size."""
    worst_first: Annotated[tuple[Annotated[tuple[Name, ...], Field(min_length=1)], ...], BeforeValidator(_groups)] = ()
    """Groups of arms: each arm of a group scores worse than each of the next group. A name alone is a group of one."""
    within: Within | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Prediction":
        if (len(self.worst_first) > 1) == (self.within is not None):
            raise ValueError("a prediction needs either `worst_first` with two groups or more, or `within`")
        return self


def named_arms(prediction: Prediction) -> tuple[str, ...]:
    """Every arm that a prediction names, once."""
    within = (prediction.within.arm, *prediction.within.of) if prediction.within else ()
    return tuple(dict.fromkeys((*(name for group in prediction.worst_first for name in group), *within)))


class StudySettings(Section):
    name: Name
    directory: str
    """Home of the runs (`runs/ID/`), the tables and the report; relative to the working directory, as `run.directory` is."""
    unequal_negatives: bool = False
    """Allow comparable runs whose rows meet different numbers of negatives; the report then says so before its first number."""
    primary: PrimaryFamily = PrimaryFamily()
    contrast: tuple[Name, Name] | None = None
    """Names on the axis `models`, the smaller one first: "as the model grows" is the change of a difference
    between these two, and the second one is the size of the primary family. None: the smallest and the largest."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Two arms are equivalent where their difference is shown to be less than this share of the other arm's score."""


class ChooseSettings(Section):
    """Makes the study a pilot: its arms are values of one setting, of which each model gets its best."""

    setting: Dotted = "optimizer.learning_rate"
    """Key that every arm sets."""
    metric: SetMetric
    """SET:METRIC of a development set, which a study that uses the pilot may score for learning curves alone."""


class Resources(Section):
    """What one run gets. `nodes` x (`gpus_per_node` or, without GPUs, `processes_per_node`) are its ranks."""

    nodes: Positive = 1
    gpus_per_node: NonNegative = 1
    processes_per_node: Positive = 1
    """Ranks of a node where `gpus_per_node` is 0 (trials on CPUs)."""
    cpus_per_node: Positive | None = None
    memory: SlurmMemory | None = None
    """Host memory of a node (sbatch --mem): 500G; 0 is all of it; null: the partition's default."""
    time: SlurmTime | None = None
    """Limit of one start of the training; it goes on in another start. Null: the site's."""

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.processes_per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class AxisValue(Section):
    name: Name
    set: dict[Dotted, Any] = Field(default_factory=dict)
    """Run settings (`section.key: value`) of this value of the axis; they win over `overrides`."""


class ArmSettings(AxisValue):
    """A batch type with its settings."""

    models: tuple[Name, ...] = ()
    """Names on the axis `models`: this arm is trained with these alone, as an alpha that only the largest size tries. None: with
    all."""


class DataSettings(AxisValue):
    """Training data and what belongs to it; `data.*` is compared among the runs of one of these alone."""


class ModelSettings(AxisValue):
    """A base model, how it is trained, and what its runs get (what is left out comes from the study's `resources`)."""

    resources: Resources = Resources()


class LaunchSettings(Section):
    processes: Positive = 1
    """Ranks of one run, on this machine."""
    command: tuple[str, ...] | None = None
    """Arguments of `accelerate launch` in place of the built ones; the number of processes and the port are added."""


class JobOptions(Section):
    """Options of sbatch that a site asks for."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: SlurmTime | None = None
    cpus_per_node: Positive | None = None
    memory: SlurmMemory | None = None
    gpu_type: str | None = None
    """As the site calls it: `a100` gives --gpus-per-node=a100:8 or --gres=gpu:a100:8."""
    sbatch: Annotated[tuple[str, ...], AfterValidator(_not_ours)] = ()
    """Any other options, one argument each: [--exclusive, --reservation=x]."""


class ModelJobs(JobOptions):
    """What the jobs of one model ask for; what `train` and `evaluate` state themselves wins, null included."""

    train: JobOptions = JobOptions()
    evaluate: JobOptions = JobOptions()


class Site(JobOptions):
    """A cluster: what every job of it needs. What `train`, `evaluate` and `collect` state themselves wins, null included."""

    train: JobOptions = JobOptions()
    evaluate: JobOptions = JobOptions()
    collect: JobOptions = JobOptions()
    models: dict[Name, ModelJobs] = Field(default_factory=dict)
    """By name on the study's axis `models`: what its jobs ask for, where sizes need different machines. It wins over all
    above and over the `resources` that the study gives the model."""
    ask_for_gpus: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    setup: str = ""
    """Shell commands that make `accelerate` available: module load ...; source .venv/bin/activate."""
    container: str = ""
    """What goes before `accelerate launch` and `python`: apptainer exec --nv image.sif."""
    srun: str = ""
    """Arguments of srun, e.g. --container-image=... of Pyxis."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(default_factory=dict)
    max_restarts: NonNegative = 20
    """How often a run that was stopped or that lost a rank is requeued."""
    max_jobs_in_queue: Annotated[int, Field(ge=3)] | None = None
    """Most jobs of this user, waiting or running, of this study or not (the site's MaxSubmitJobs): what doesn't fit is left for a
    later `submit`. 3 are a training, its evaluation and the report."""


class StudyConfig(Section):
    """One study, whole. Its axes are `models`, `data`, `arms`, `alpha`, `pool_rows` and `seeds`.

    Unknown keys are `ConfigError`s.
    """

    study: StudySettings
    predictions: tuple[Prediction, ...] = ()
    """What is expected of the runs. None: the report holds them against the directions that earlier work found."""
    pilot: str | None = None
    """Study file of a pilot (relative to this one), whose choices become settings of the models; it must have run before this
    study is started, and is planned with it."""
    choose: ChooseSettings | None = None
    """For a pilot: what it decides."""
    base: str | dict[str, Any]
    """A run's YAML file (relative to the study file) or its content."""
    overrides: dict[Dotted, Any] = Field(default_factory=dict)
    """Run settings (`section.key: value`) that all runs share and the base doesn't."""
    models: tuple[ModelSettings, ...] = ()
    """None: the base's."""
    data: tuple[DataSettings, ...] = ()
    """None: the base's."""
    arms: Annotated[tuple[ArmSettings, ...], Field(min_length=1)]
    alpha: tuple[Share, ...] = ()
    """Every arm of the type `hybrid` that doesn't set its own alpha becomes one arm for each of these."""
    pool_rows: tuple[Positive, ...] = ()
    """Sizes of the contrastive pools: every arm is trained with each of them. Runs of two sizes are never compared by arm, as
    their rows meet different numbers of negatives. None: the base's."""
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0,)
    evaluate: tuple[str, ...] = ()
    """Prepared retrieval sets scored after the training, each run in a job of its own, besides the base's `data.evaluate`,
    which the training scores itself before it ends. For large sets."""
    resources: Resources = Resources()
    launch: LaunchSettings = LaunchSettings()
    site: Site | None = None
    """Used by `submit` where no `--site FILE` is given."""
    may_differ: tuple[HeldEqual, ...] = ()
    """Settings that runs may vary although they are normally held equal."""
