"""The models and clusters of the Alpa paper's experiments, and how it counts operations.

End to end (section 8.1, tables 6 to 8): the model grows with the number of V100s. Intra-operator (section
8.2): models of 8 layers, or Wide-ResNets, on one host, a small batch in one piece, no pipeline.
The embeddings of the paper's transformers are not tied, and its experts have no auxiliary loss.

Left out: the operations of MoE's auxiliary loss, which stay in the model here; they are few.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import optax

from launcher import models
from launcher.autopar.clusters.cluster import Cluster, load_cluster
from launcher.bench.paper_figures import END_TO_END, INTRA_OP
from launcher.config import GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.models.model import Model
from launcher.models.sizes import default_global_batch, gpt_size, moe_size

FAMILIES = ("gpt", "moe", "wrn")
DEVICES = (1, 2, 4, 8, 16, 32, 64)
_PER_HOST = 8
_REMATERIALISED = 4 / 3  # of a step's operations: a forward pass more

_SIZES: Mapping[str, tuple[str, ...]] = {
    "gpt": ("350m", "760m", "1.3b", "2.6b", "6.7b", "15b", "39b"),
    "moe": ("380m", "690m", "1.3b", "2.4b", "10b", "27b", "70b"),
    "wrn": ("250m", "500m", "1b", "2b", "4b", "6.8b", "13b"),
}
_CONFIGS = {
    "gpt": GptConfig(size="125m", dtype="fp16", tied_embeddings=False),
    "moe": MoeConfig(size="380m", dtype="fp16", tied_embeddings=False, aux_loss_weight=0.0),
    "wrn": WrnConfig(size="250m", dtype="fp32"),
}
_OPTIMIZERS = {
    "gpt": optax.adamw(1e-3),
    "moe": optax.adafactor(1e-3),
    "wrn": optax.sgd(1e-3, momentum=0.9),
}
# Of the intra-operator experiment, by 1, 2, 4 and 8 devices.
_INTRA_OP_FIELDS: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "gpt": tuple(
        {"hidden": hidden, "layers": 8, "heads": heads, "vocab_size": 25600}
        for hidden, heads in ((2048, 16), (3072, 24), (4096, 32), (5760, 40))
    ),
    "moe": tuple(
        {"hidden": hidden, "layers": 8, "heads": heads, "experts": experts}
        | {"vocab_size": 51200, "expert_group_size": 1024}
        for hidden, heads, experts in (
            (1024, 32, 8),
            (1280, 40, 16),
            (1536, 24, 16),
            (1536, 24, 32),
        )
    ),
    "wrn": tuple({"base_channels": channels} for channels in (160, 224, 320, 448)),
}
_INTRA_OP_BATCH = {"gpt": 8, "moe": 8, "wrn": 32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A model on some devices.

    Attributes:
        size: The model in words.
    """

    experiment: str
    family: str
    num_devices: int
    size: str
    config: ModelConfig
    global_batch: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return _OPTIMIZERS[self.family]

    def model(self) -> Model:
        """Build the model, from shapes alone."""
        return models.build(self.config)

    def cluster(self) -> Cluster:
        """So many of the V100s of the paper's cluster, whole hosts first."""
        hosts = max(1, self.num_devices // _PER_HOST)
        return replace(
            load_cluster("8xp3"), num_hosts=hosts, devices_per_host=self.num_devices // hosts
        )

    def paper_flops(self, model_flops: float) -> float:
        """The operations of a step by the paper's count, given those by ours.

        Which is three times the forward products and convolutions. The paper counts GPT's and MoE's by
        formulas, with recomputation but for the logits, and takes Wide-ResNet's from XLA.
        """
        match self.config:
            case GptConfig():
                return _gpt_flops(self.config, self.global_batch)
            case MoeConfig():
                return _moe_flops(self.config, self.global_batch)
            case _:
                return model_flops


def find_cases(experiment: str, family: str) -> list[Case]:
    """The cases of an experiment, by ascending number of devices."""
    if experiment == END_TO_END:
        return [_end_to_end(family, *pair) for pair in zip(DEVICES, _SIZES[family], strict=True)]
    assert experiment == INTRA_OP
    fields = _INTRA_OP_FIELDS[family]
    return [_intra_op(family, number, fields[at]) for at, number in enumerate((1, 2, 4, 8))]


def _end_to_end(family: str, num_devices: int, size: str) -> Case:
    return Case(
        experiment=END_TO_END,
        family=family,
        num_devices=num_devices,
        size=size,
        config=replace(_CONFIGS[family], size=size),
        global_batch=default_global_batch(family, size),
    )


def _intra_op(family: str, num_devices: int, fields: Mapping[str, int]) -> Case:
    return Case(
        experiment=INTRA_OP,
        family=family,
        num_devices=num_devices,
        size=", ".join(f"{name} {value}" for name, value in list(fields.items())[:1]),
        config=replace(_CONFIGS[family], **fields),
        global_batch=_INTRA_OP_BATCH[family],
    )


def _gpt_flops(config: GptConfig, batch: int) -> float:
    """Alpa's `benchmark/alpa/util.py`: 96 B S H^2 L (1 + S / 6H) + 6 B S H V."""
    size = gpt_size(config)
    tokens, hidden = batch * size.seq_len, size.hidden
    blocks = 72 * tokens * hidden**2 * size.layers * (1 + size.seq_len / (6 * hidden))
    return _REMATERIALISED * blocks + 6 * tokens * hidden * size.vocab_size


def _moe_flops(config: MoeConfig, batch: int) -> float:
    """The same file: a dense block and one with experts in turn, top-2 routing."""
    size = moe_size(config)
    trunk, experts = size.transformer, size.experts
    tokens, hidden, group = batch * trunk.seq_len, trunk.hidden, experts.expert_group_size
    attention = 8 * tokens * hidden**2 + 4 * tokens * trunk.seq_len * hidden
    feed_forward = 4 * trunk.mlp_factor * tokens * hidden**2
    routing = 2 * tokens * hidden * experts.experts + 4 * tokens * group
    dispatch = 8 * tokens * hidden * group
    pair = 2 * attention + 3 * feed_forward + routing + dispatch
    logits = 6 * tokens * hidden * trunk.vocab_size
    return _REMATERIALISED * 3 * trunk.layers / 2 * pair + logits
