"""The sizes of each family, from a laptop's `tiny` to the largest of papers, and their checks.

GPT 125m to 76b, MoE and Wide-ResNet are the tables of the Alpa paper (OSDI 2022, tables 6 to 8),
with the numbers of heads of its code where its text prints others; GPT 145b to 1t is the table of
Megatron-LM's SC'21 paper. Any field of a size may be overridden by the field of the same name in
the config.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.config import GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.errors import ConfigError

SECOND_EXPERT = ("always", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSize:
    """The trunk of a GPT or an MoE."""

    hidden: int
    layers: int
    heads: int
    seq_len: int
    vocab_size: int
    mlp_factor: int = 4  # width of the feed-forward layer over hidden
    tied_embeddings: bool = True
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSize:
    """The experts of an MoE and how tokens are routed to them."""

    experts: int
    expert_group_size: int
    capacity_factor: float = 2.0
    second_expert: str = "always"
    aux_loss_weight: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSize:
    """A mixture of experts: the trunk and, in every second layer, the experts."""

    transformer: TransformerSize
    experts: ExpertsSize


@dataclass(frozen=True, slots=True, kw_only=True)
class WrnSize:
    """A Wide-ResNet."""

    depth: int
    base_channels: int
    width_factor: int
    image_size: int = 224
    num_classes: int = 1024


Size = TypeVar("Size", TransformerSize, ExpertsSize, MoeSize, WrnSize)


def _gpt(hidden: int, layers: int, heads: int) -> TransformerSize:
    return TransformerSize(
        hidden=hidden, layers=layers, heads=heads, seq_len=1024, vocab_size=51200
    )


def _sc21(hidden: int, layers: int, heads: int) -> TransformerSize:
    return TransformerSize(
        hidden=hidden, layers=layers, heads=heads, seq_len=2048, vocab_size=51200
    )


def _moe(hidden: int, layers: int, experts: int) -> MoeSize:
    trunk = TransformerSize(
        hidden=hidden, layers=layers, heads=16, seq_len=1024, vocab_size=32000, mlp_factor=8
    )
    return MoeSize(transformer=trunk, experts=ExpertsSize(experts=experts, expert_group_size=2048))


def _wrn(depth: int, base_channels: int, width_factor: int) -> WrnSize:
    return WrnSize(depth=depth, base_channels=base_channels, width_factor=width_factor)


_TINY_TRUNK = TransformerSize(hidden=64, layers=4, heads=4, seq_len=64, vocab_size=256)

# The sizes that `auto` may choose stand first, in ascending order, then those it may not.
GPT_PAPER = {
    "125m": _gpt(768, 12, 12),
    "350m": _gpt(1024, 24, 16),
    "760m": _gpt(1536, 24, 16),
    "1.3b": _gpt(2048, 24, 32),
    "2.6b": _gpt(2560, 32, 32),
    "6.7b": _gpt(4096, 32, 32),
    "15b": _gpt(5120, 48, 40),  # the paper prints 32 heads, its code has 40
    "39b": _gpt(8192, 48, 64),
    "76b": _gpt(10240, 60, 80),
}
GPT_SC21 = {
    "145b": _sc21(12288, 80, 96),
    "310b": _sc21(16384, 96, 128),
    "530b": _sc21(20480, 105, 128),
    "1t": _sc21(25600, 128, 160),
}
GPT_SIZES = {"tiny": _TINY_TRUNK} | GPT_PAPER | GPT_SC21

MOE_PAPER = {
    "380m": _moe(768, 8, 8),
    "690m": _moe(768, 8, 16),
    "1.3b": _moe(768, 16, 16),
    "2.4b": _moe(1024, 16, 16),
    "7.1b": _moe(1280, 16, 32),
    "10b": _moe(1536, 16, 32),
    "27b": _moe(2048, 16, 48),  # the paper prints 32 heads for this and the next
    "70b": _moe(2048, 32, 64),
    "140b": _moe(2048, 32, 128),
}
_TINY_MOE = MoeSize(transformer=_TINY_TRUNK, experts=ExpertsSize(experts=4, expert_group_size=64))
MOE_SIZES = {"tiny": _TINY_MOE} | MOE_PAPER

WRN_PAPER = {
    "250m": _wrn(50, 160, 2),
    "500m": _wrn(50, 224, 2),
    "1b": _wrn(50, 320, 2),
    "2b": _wrn(50, 448, 2),
    "4b": _wrn(50, 640, 2),
    "6.8b": _wrn(50, 320, 16),
    "13b": _wrn(101, 320, 16),
}
_TINY_WRN = WrnSize(depth=20, base_channels=16, width_factor=2, image_size=8, num_classes=10)
WRN_SIZES = {"tiny": _TINY_WRN} | WRN_PAPER

PAPER_SIZES = {"gpt": tuple(GPT_PAPER), "moe": tuple(MOE_PAPER), "wrn": tuple(WRN_PAPER)}

# Bottleneck blocks in each stage of a Wide-ResNet. A depth counts three convolutions for each
# block, the stem and the classifier.
WRN_BLOCKS = {
    11: (1, 1, 1),
    14: (1, 1, 1, 1),
    20: (2, 2, 2),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

# Images from this size on go through the large stem, which divides their sides by 4.
WRN_LARGE_IMAGE = 64

_GLOBAL_BATCH = {"gpt": 1024, "moe": 1024, "wrn": 1536}
_GLOBAL_BATCH_OF = {
    ("wrn", "13b"): 1520,
    ("gpt", "145b"): 2304,
    ("gpt", "310b"): 2160,
    ("gpt", "530b"): 2520,
    ("gpt", "1t"): 3072,
}


def default_global_batch(family: str, size: str) -> int:
    """Return the samples per optimizer step that the paper trains this size with."""
    if size == "tiny":
        return 32
    return _GLOBAL_BATCH_OF.get((family, size), _GLOBAL_BATCH[family])


def table_fields(family: str, size: str) -> dict[str, Any]:
    """Return the fields of a size, by their names in the config; none of one that no table has."""
    tables = {"gpt": GPT_SIZES, "moe": MOE_SIZES, "wrn": WRN_SIZES}
    entry = tables.get(family, {}).get(size)
    if entry is None:
        return {}
    parts = (entry.transformer, entry.experts) if isinstance(entry, MoeSize) else (entry,)
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


def gpt_size(config: GptConfig) -> TransformerSize:
    """Return the size that a config names, with its overrides, checked."""
    size = _override(_look_up(GPT_SIZES, config), config)
    _check_transformer(size)
    return size


def moe_size(config: MoeConfig) -> MoeSize:
    """Return the size that a config names, with its overrides, checked."""
    entry = _look_up(MOE_SIZES, config)
    size = MoeSize(
        transformer=_override(entry.transformer, config),
        experts=_override(entry.experts, config),
    )
    _check_transformer(size.transformer)
    _check_experts(size)
    return size


def wrn_size(config: WrnConfig) -> WrnSize:
    """Return the size that a config names, with its overrides, checked."""
    size = _override(_look_up(WRN_SIZES, config), config)
    _check_positive(size)
    if size.depth not in WRN_BLOCKS:
        raise ConfigError(
            f"no Wide-ResNet has depth {size.depth} (model.depth={size.depth}): "
            f"choose one of {', '.join(map(str, WRN_BLOCKS))}"
        )
    reduction = wrn_reduction(size)
    if size.image_size % reduction:
        raise ConfigError(
            f"images of {size.image_size} x {size.image_size} cannot be divided into whole numbers "
            f"by {reduction} (model.image_size={size.image_size}): choose a multiple of {reduction}"
        )
    return size


def wrn_reduction(size: WrnSize) -> int:
    """Return by how much the network divides the sides of an image."""
    stem = 4 if size.image_size >= WRN_LARGE_IMAGE else 1
    return stem * 2 ** (len(WRN_BLOCKS[size.depth]) - 1)


def _look_up(table: dict[str, Size], config: ModelConfig) -> Size:
    if config.size not in table:
        raise ConfigError(
            f"model={config.name} has no size {config.size!r} (model.size={config.size}): "
            f"choose one of {', '.join(table)}, or auto"
        )
    return table[config.size]


def _override(size: Size, config: ModelConfig) -> Size:
    names = {field.name for field in dataclasses.fields(size)}
    given = dataclasses.asdict(config)
    chosen = {name: given[name] for name in names & set(given) if given[name] is not None}
    return dataclasses.replace(size, **chosen)


def _check_positive(size: TransformerSize | ExpertsSize | WrnSize) -> None:
    for name, value in dataclasses.asdict(size).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(
                f"a model cannot have {value} {name} (model.{name}={value}): set 1 or more"
            )


def _check_transformer(size: TransformerSize) -> None:
    _check_positive(size)
    if size.hidden % size.heads:
        raise ConfigError(
            f"{size.heads} heads do not divide a hidden size of {size.hidden} "
            f"(model.heads={size.heads}): choose a divisor of model.hidden={size.hidden}"
        )
    if not 0.0 <= size.dropout < 1.0:
        raise ConfigError(
            f"a dropout of {size.dropout} is not a probability below 1 "
            f"(model.dropout={size.dropout}): choose 0 <= dropout < 1"
        )


def _check_experts(size: MoeSize) -> None:
    experts = size.experts
    _check_positive(experts)
    if size.transformer.layers < 2:
        raise ConfigError(
            f"every second layer has experts, and there is only {size.transformer.layers} layer "
            f"(model.layers={size.transformer.layers}): set 2 or more"
        )
    if experts.experts < 2:
        raise ConfigError(
            f"each token goes to 2 experts, and there is only {experts.experts} "
            f"(model.experts={experts.experts}): set 2 or more"
        )
    if experts.second_expert not in SECOND_EXPERT:
        raise ConfigError(
            f"no rule for the second expert is called {experts.second_expert!r} "
            f"(model.second_expert={experts.second_expert}): choose {' or '.join(SECOND_EXPERT)}"
        )
    if experts.aux_loss_weight < 0:
        raise ConfigError(
            f"a weight of {experts.aux_loss_weight} would reward unbalanced experts "
            f"(model.aux_loss_weight={experts.aux_loss_weight}): set 0 or more"
        )
    capacity(experts, experts.expert_group_size)


def capacity(experts: ExpertsSize, group_tokens: int) -> int:
    """Return how many tokens of a group an expert takes: C = 2 S / E at the default factor."""
    slots = int(experts.capacity_factor * group_tokens) // experts.experts
    if slots < 1:
        raise ConfigError(
            f"{experts.experts} experts get no token of a group of {group_tokens} at a capacity "
            f"factor of {experts.capacity_factor} "
            f"(model.capacity_factor={experts.capacity_factor}): raise it, take larger groups, "
            f"or fewer than model.experts={experts.experts}"
        )
    return slots
