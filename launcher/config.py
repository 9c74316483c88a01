"""What a user can configure: one schema dataclass per choice.

Schemas live here and values in `conf/*.yaml`; Hydra joins them (`conf/config.yaml` starts from
the schema stored as `schema`, `conf/model/gpt.yaml` from `schema_model_gpt`, and so on).
`cli.compose` turns a composed config into these plain objects once; no lower layer sees
OmegaConf. Schemas are not frozen, because Hydra writes YAML into them; nobody changes them after
that. `null` means "not chosen". What the fields may hold, and which contradict one another, is in
`checks`.
"""

import pathlib
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from launcher.slurm_config import SlurmConfig


@dataclass(kw_only=True)
class ModelConfig:
    """A model family at a size; subclasses add the fields of a size, to override one by one."""

    name: str
    size: str = "auto"  # a name of the family's table; auto: the largest that fits the cluster
    dtype: str = "auto"  # of the computation: auto | fp32 | bf16 | fp16 | fp64
    weights: str | None = None  # a safetensors file to begin with; null: drawn from the seed


@dataclass(kw_only=True)
class GptConfig(ModelConfig):
    """A GPT decoder."""

    name: str = "gpt"
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    seq_len: int | None = None
    vocab_size: int | None = None
    tied_embeddings: bool | None = None
    dropout: float | None = None
    attention: str = "auto"  # plain | cudnn; auto: cudnn where the cluster's GPUs have it
    loss_chunks: int | None = None  # pieces of the sequence that get their logits in turn; null: 1


@dataclass(kw_only=True)
class MoeConfig(ModelConfig):
    """A GShard mixture of experts: a GPT whose every second layer has experts."""

    name: str = "moe"
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    seq_len: int | None = None
    vocab_size: int | None = None
    tied_embeddings: bool | None = None
    dropout: float | None = None
    attention: str = "auto"  # plain | cudnn; auto: cudnn where the cluster's GPUs have it
    loss_chunks: int | None = None  # pieces of the sequence that get their logits in turn; null: 1
    experts: int | None = None
    expert_group_size: int | None = None  # tokens that are routed together
    mlp_factor: int | None = None  # width of the feed-forward layer over hidden
    capacity_factor: float = 2.0  # an expert takes capacity_factor * group size / experts tokens
    second_expert: str = "always"  # always | random: with a probability in proportion to its gate
    aux_loss_weight: float = 0.01  # of the loss that balances the experts' load


@dataclass(kw_only=True)
class WrnConfig(ModelConfig):
    """A Wide-ResNet."""

    name: str = "wrn"
    depth: int | None = None
    base_channels: int | None = None
    width_factor: int | None = None
    image_size: int | None = None
    num_classes: int | None = None


@dataclass(kw_only=True)
class CustomConfig(ModelConfig):
    """The user's own model."""

    name: str = "custom"
    target: str  # package.module:function, called as function(rngs, **args)
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DeviceConfig:
    """One device of a cluster; figures in the units that their names say."""

    kind: str
    memory_gib: float
    reserved_gib: float = 0.0  # of it, what plans leave to the driver and to communication
    peak_tflops: dict[str, float]  # dtype -> dense peak; a dtype that is missing has no known peak
    memory_gb_per_s: float
    matmul_efficiency: dict[str, float]  # dtype -> share of the peak that large products reach
    has_bf16: bool
    accelerator: bool
    # dtype -> [[GFLOP of one product on one device, share of the peak], ...], and so for convolutions
    matmul_curve: dict[str, Any] = field(default_factory=dict)
    convolution_curve: dict[str, Any] = field(default_factory=dict)
    kernel_gradient_curve: dict[str, Any] = field(default_factory=dict)  # of convolutions
    # By the GFLOP of one of a batch.
    batched_matmul_curve: dict[str, Any] = field(default_factory=dict)
    # arithmetic, division, transcendental, reduction, transposition -> ns per element
    element_ns: dict[str, float] = field(default_factory=dict)
    op_overhead_us: float = 0.0  # of each kernel
    program_launch_us: float = 0.0  # of each program of a step
    array_launch_us: float = 0.0  # of each array that it takes or makes
    overlaps_collectives: bool | None = None  # beside computation; null: if it is an accelerator
    # [[devices of a host that compute at once, times slower each is], ...], and what work is slower yet
    concurrency: list[Any] = field(default_factory=list)
    crowding: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class IntraHostConfig:
    """The links between the devices of a host, per device and direction."""

    gb_per_s: float
    latency_us: float
    # all_reduce, all_gather, reduce_scatter, all_to_all, send -> [[MB sent by a device, GB/s], ...]
    collective_curve: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class InterHostConfig:
    """The network between hosts, per direction."""

    gbit_per_s: float
    latency_us: float
    shared_by_host: bool = True  # one link for all devices of a host, not one for each
    collective_curve: dict[str, Any] = field(default_factory=dict)  # as inside a host


@dataclass(kw_only=True)
class ClusterConfig:
    """A cluster as its YAML file describes it; `autopar.clusters.hosts` has it in SI units.

    Either its hosts are all alike, or `groups` says what each kind of them is.
    """

    name: str
    hosts: int | None = None
    devices_per_host: int | None = None
    device: DeviceConfig | None = None
    intra_host: IntraHostConfig | None = None
    inter_host: InterHostConfig  # of groups: between hosts of different kinds
    # Each {hosts, devices_per_host, device, intra_host}, or {cluster: NAME, hosts} with the rest from there
    groups: list[Any] | None = None
    nominal: bool = False  # the figures are nominal, not measured
    sources: dict[str, str] = field(default_factory=dict)  # figure -> where it comes from
    slurm: SlurmConfig = field(default_factory=SlurmConfig)  # how it takes jobs


@dataclass(kw_only=True)
class ParallelConfig:
    """How to parallelise; which fields are free and which contradict it depends on `name`."""

    name: str = "auto"  # single | data | zero | manual | auto | from_file
    num_microbatches: int | str = "auto"
    dp: int | None = None  # degrees of data, tensor, pipeline and expert parallelism
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    zero: int | None = None  # 0-3: shards nothing, optimizer state, also gradients, also weights
    recompute: str | None = None  # none | layer | full
    schedule: str | None = None  # gpipe | 1f1b (null: this one) | interleaved | zb_h1
    virtual_stages: int | None = None  # stages on a submesh; interleaved: 2 or more (null: 2)
    path: str | None = None  # of parallel=from_file


@dataclass(kw_only=True)
class DataConfig:
    """Where batches come from; subclasses are the kinds of source."""

    name: str


@dataclass(kw_only=True)
class TextDataConfig(DataConfig):
    """Text files, or the English of Python's own documentation where `path` is null."""

    name: str = "text"
    valid_fraction: float = 0.05  # of the samples, held out for the validation loss
    path: str | None = None
    tokenizer: str = "bytes"  # bytes | bpe (trained on the text itself)


@dataclass(kw_only=True)
class TokensDataConfig(DataConfig):
    """A file of token ids."""

    name: str = "tokens"
    valid_fraction: float = 0.05  # of the samples, held out for the validation loss
    path: str | None = None


@dataclass(kw_only=True)
class DigitsDataConfig(DataConfig):
    """The hand-written digits that come with scikit-learn."""

    name: str = "digits"
    valid_fraction: float = 0.05  # of the samples, held out for the validation loss


@dataclass(kw_only=True)
class ImagesDataConfig(DataConfig):
    """A folder with one folder of images per class."""

    name: str = "images"
    valid_fraction: float = 0.05  # of the samples, held out for the validation loss
    path: str | None = None


@dataclass(kw_only=True)
class SyntheticDataConfig(DataConfig):
    """Random batches of the model's shapes."""

    name: str = "synthetic"


@dataclass(kw_only=True)
class OptimizerConfig:
    """What all optimizers share; subclasses are the optimizers."""

    name: str
    learning_rate: float
    warmup_steps: int  # the learning rate rises linearly from 0
    decay: str  # after the warm-up: constant | cosine | linear (to 0 at the last step)
    clip_norm: float  # the largest global norm of the gradients; 0: no clipping
    weight_decay: float
    loss_scale: str = "auto"  # auto (dynamic for fp16, else 1) | dynamic | a number


@dataclass(kw_only=True)
class AdamwConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    name: str = "adamw"
    beta1: float
    beta2: float
    eps: float


@dataclass(kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor: second moments kept by rows and columns."""

    name: str = "adafactor"


@dataclass(kw_only=True)
class SgdConfig(OptimizerConfig):
    """Gradient descent with momentum."""

    name: str = "sgd"
    momentum: float


@dataclass(kw_only=True)
class LoggerConfig:
    """Where metrics go besides the terminal and metrics.jsonl."""

    name: str  # wandb | jsonl (nothing else)
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RuntimeConfig:
    """What executes the plan."""

    name: str  # auto | local | emulate | ray
    compilation_cache: str = "auto"  # auto | off | a folder
    address: str | None = "auto"  # of Ray: host:port | auto (RAY_ADDRESS, if set) | null (its own)
    max_restarts: int = 3  # how often a run begins anew that has lost a host
    heartbeat_s: float = 1.0  # between two looks at every host; ten without a sign: it is lost


@dataclass(kw_only=True)
class TrainConfig:
    """How long to train and when to evaluate."""

    steps: int
    global_batch: int | None  # samples per optimizer step; null: the default of the model's size
    tokens: float | None  # a budget: what it would take is said with the plan; null: none
    eval_every: int  # steps between evaluations; 0: only after the last step
    eval_batches: int  # batches per evaluation; 0: no evaluation
    nonfinite_steps: int  # in a row whose loss or gradients are not finite, and that are forgiven
    max_rollbacks: (
        int  # how often the run then goes back to its last checkpoint, without their batches
    )
    trace_steps: list[int]  # steps whose every instruction is timed, for trace.json and trace.html
    profile_steps: list[int]  # steps that jax's profiler records, into profile/
    export_weights: bool  # write weights.safetensors at the end
    sample_tokens: int  # tokens of text to write at the end; 0: none
    sample_prompt: str  # what that text begins with
    sample_temperature: float  # of the draws; 0: always the likeliest token
    sample_top_k: int  # draw from so many of the likeliest tokens; 0: from all


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, where, and which stay. Without both intervals there are none."""

    every_steps: int | None  # null or 0: not by steps
    every_minutes: float | None  # null or 0: not by time
    keep: int  # so many of the newest
    best: bool  # also the one with the lowest evaluation loss, written when that is found
    dir: str | None  # null: checkpoints/ in the run's folder

    @property
    def writes(self) -> bool:
        """Whether there are any."""
        return bool(self.every_steps or self.every_minutes)


@dataclass(kw_only=True)
class PlanConfig:
    """What to do with a plan besides carrying it out."""

    compare: str | None  # another plan file: how the two differ, and why one is faster
    why_not: list[
        Any
    ]  # forced choices to price beside the plan, such as [{pp: 1}, {tp: 2, zero: 2}]
    audit: bool  # compile every stage; compare its collectives and memory with the priced ones


@dataclass(kw_only=True)
class ProfileConfig:
    """Where mode=profile writes the cluster file DIR/cluster/NAME.yaml."""

    dir: str | None  # null: the run's folder
    name: str | None  # null: the cluster's and the host's name


@dataclass(kw_only=True)
class Config:
    """Everything a run is told."""

    mode: str  # train | plan | eval | profile | submit
    seed: int
    debug: bool
    dry_run: bool  # print the batch script of a job, and submit nothing
    model: ModelConfig
    cluster: ClusterConfig
    # A default, because OmegaConf cannot expand a missing node that has a union (num_microbatches).
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    optimizer: OptimizerConfig
    logger: LoggerConfig
    runtime: RuntimeConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    resume: str  # auto (the newest of the run's folder, if it has one) | none | a path
    resume_weights_only: bool
    replan: bool  # resume on other devices than those of the checkpoint's plan
    plan: PlanConfig
    profile: ProfileConfig


# The groups whose alternatives have fields of their own: (group, name of the option) -> schema.
SCHEMAS = {
    ("model", "gpt"): GptConfig,
    ("model", "moe"): MoeConfig,
    ("model", "wrn"): WrnConfig,
    ("model", "custom"): CustomConfig,
    ("data", "text"): TextDataConfig,
    ("data", "tokens"): TokensDataConfig,
    ("data", "digits"): DigitsDataConfig,
    ("data", "images"): ImagesDataConfig,
    ("data", "synthetic"): SyntheticDataConfig,
    ("optimizer", "adamw"): AdamwConfig,
    ("optimizer", "adafactor"): AdafactorConfig,
    ("optimizer", "sgd"): SgdConfig,
}


def register_schemas() -> None:
    """Store the schemas where `conf/` refers to them.

    They are stored outside the groups: `--help` and shell completion list a group's members, and a
    schema is not something to choose.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for (group, name), schema in SCHEMAS.items():
        store.store(name=f"schema_{group}_{name}", node=schema)


def conf_dir() -> pathlib.Path:
    """Return the folder of the YAML files: in an installed package, or beside a checkout's."""
    package = pathlib.Path(__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"
