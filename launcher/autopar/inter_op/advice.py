"""What to say where nothing fits: the keys that were set, the devices, and the values that would do.

Degrees that cannot share the cluster, a batch that cannot be cut for them, and experts that are not there
are the user's input; a model that needs more memory than there is has no feasible plan. Every cure is one
that the mode allows. Values are found by trying them (`space.fits`), one key at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.inter_op.space import (
    PlanOptions,
    devices_by_kind,
    divisors,
    experts_fit,
    fits,
    forced_degrees,
    microbatch_counts,
    num_devices,
    stage_views,
    virtual_stages,
)
from launcher.autopar.programs.schedules import require_groups
from launcher.autopar.sharding.restrictions import expert_counts
from launcher.autopar.text.wording import count, either, large
from launcher.errors import ConfigError, InfeasiblePlanError

_MOST_VALUES = 6


def check_degrees(options: PlanOptions, cluster: AnyCluster) -> None:
    """Raise `ConfigError` where no plan of the forced degrees uses up the cluster's devices."""
    if fits(options, cluster):
        return
    given = _given(options)
    cures = [cure for key in given for cure in _degree_cures(options, cluster, key)]
    cures = cures or [_last_cure(options, cluster)]
    keys = ", ".join(f"parallel.{key}={value}" for key, value in given.items())
    raise ConfigError(
        f"{keys or f'parallel={options.mode}'} cannot share out the {cluster.shape_text} of "
        f"cluster={cluster.name}: {_reason(options, cluster)}; set {', or '.join(cures)}"
    )


def _last_cure(options: PlanOptions, cluster: AnyCluster) -> str:
    """What to do where no other value of one key would do."""
    if options.pp is None and _too_few_stages(options, cluster):
        by_hand = PlanOptions(mode="manual", global_batch=options.global_batch)
        stages = " or ".join(_degree_cures(by_hand, cluster, "pp"))
        here = options.mode == "manual"
        return stages if here else f"parallel=auto, or parallel=manual and {stages}"
    return "leave some of them out" if len(_given(options)) > 1 else "leave it out"


def _too_few_stages(options: PlanOptions, cluster: AnyCluster) -> bool:
    """Whether the stages that are asked for leave a kind of hosts without one."""
    _, _, stages = forced_degrees(options, cluster)
    return stages is not None and stages < len(cluster.kinds)


def _given(options: PlanOptions) -> dict[str, int]:
    values = {"dp": options.dp, "tp": options.tp, "pp": options.pp, "ep": options.ep}
    return {key: value for key, value in values.items() if value is not None}


def _reason(options: PlanOptions, cluster: AnyCluster) -> str:
    data, tensor, stages = forced_degrees(options, cluster)
    total = num_devices(options, cluster)
    if _too_few_stages(options, cluster):
        return (
            f"a stage lies on hosts of one kind, {count(len(cluster.kinds), 'kind')} need as many stages, "
            f"and parallel.pp={stages}"
        )
    for kind in cluster.kinds:
        if tensor is not None and kind.devices_per_host % tensor:
            per_host = count(kind.devices_per_host, "device")
            return f"a tensor axis must divide the {per_host} of a host"
    if options.mode != "auto" and data is not None and data * tensor * stages != total:
        product = data * tensor * stages
        return f"dp {data} x tp {tensor} x pp {stages} is {count(product, 'device')}, not {total}"
    if not experts_fit(options, cluster):
        axis = count(options.dp or data, "device")
        return f"experts are split over the whole data axis, of {axis} here, or not at all"
    return (
        "a stage takes 1, 2, 4, ... devices of a host, or whole hosts, as dp x tp with tp inside a host, "
        f"and the stages together take all {total}"
    )


def _degree_cures(options: PlanOptions, cluster: AnyCluster, key: str) -> Iterator[str]:
    """The other values of one key with which the rest could stay."""
    most = num_devices(options, cluster)
    candidates = range(1, most + 1) if key == "pp" else divisors(most)
    found = [value for value in candidates if fits(replace(options, **{key: value}), cluster)]
    if found:
        yield f"parallel.{key}={_choice(found)}"


def _choice(values: Sequence[int]) -> str:
    """At most half a dozen values, the largest among them."""
    texts = [str(value) for value in values]
    return either(
        texts if len(texts) <= _MOST_VALUES else [*texts[: _MOST_VALUES - 2], "...", texts[-1]]
    )


def check_batch(options: PlanOptions, cluster: AnyCluster) -> None:
    """Raise `ConfigError` where the batch cannot be cut into microbatches for the data axis."""
    batch, number = options.global_batch, options.num_microbatches
    if number is not None and batch % number:
        raise ConfigError(
            f"train.global_batch={batch} does not divide into parallel.num_microbatches={number} equal "
            f"parts; set parallel.num_microbatches={_choice(divisors(batch))}"
        )
    counts = sorted(microbatch_counts(options, cluster))
    if number in counts or (number is None and counts):
        return
    axis = _shortest_data_axis(options, cluster)
    cures = [f"parallel.num_microbatches={_choice(counts)}"] if counts else []
    cures.append(f"train.global_batch={_next_multiple(batch, axis * (number or 1))}")
    if options.mode in ("manual", "auto"):
        cures.append("degrees that leave the data axis fewer devices")
    cut = "" if number is None else f", parallel.num_microbatches={number}"
    keys = "".join(f", parallel.{key}={value}" for key, value in _given(options).items())
    raise ConfigError(
        f"{'a batch' if number is None else 'a microbatch'} of {count(batch // (number or 1), 'sample')} "
        f"(train.global_batch={batch}{cut}) cannot be shared evenly by a data axis of "
        f"{count(axis, 'device')} (parallel={options.mode}{keys}); set {', or '.join(cures)}"
    )


def _shortest_data_axis(options: PlanOptions, cluster: AnyCluster) -> int:
    """The least data degree among those of plans whose stages are alike in it."""
    degrees = sorted({view.data for view in stage_views(options, cluster)})
    return next(degree for degree in degrees if fits(options, cluster, degree))


def _next_multiple(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def check_kinds(options: PlanOptions, cluster: AnyCluster) -> None:
    """Raise `ConfigError` for a schedule of equal submeshes where hosts are not alike."""
    if virtual_stages(options) > 1 and len(cluster.kinds) > 1:
        raise ConfigError(
            f"parallel.schedule=interleaved has {virtual_stages(options)} stages "
            f"(parallel.virtual_stages) on each of several equal submeshes, and the hosts of "
            f"cluster={cluster.name} are of {len(cluster.kinds)} kinds; take parallel.schedule=1f1b, or "
            f"gpipe or zb_h1"
        )


def check_groups(options: PlanOptions) -> None:
    """Raise `ConfigError` where the interleaved schedule cannot group the microbatches."""
    if virtual_stages(options) == 1 or options.pp is None:
        return
    if options.num_microbatches is not None:
        require_groups(options.pp, options.num_microbatches)
    elif options.global_batch % options.pp:
        raise ConfigError(
            f"train.global_batch={options.global_batch} has no number of microbatches that is a multiple "
            f"of the parallel.pp={options.pp} submeshes that parallel.schedule=interleaved groups them by; "
            f"set train.global_batch={_next_multiple(options.global_batch, options.pp)}, or another "
            f"parallel.pp, or parallel.schedule=1f1b"
        )


def check_stages(
    options: PlanOptions, cluster: AnyCluster, num_layers: int, microbatch_size: int
) -> None:
    """Raise `InfeasiblePlanError` where so many stages are needed that there are not enough layers."""
    largest: dict[int, int] = {}
    for view in stage_views(options, cluster):
        if microbatch_size % view.data == 0:
            largest[view.kind] = max(view.num_devices, largest.get(view.kind, 0))
    totals = devices_by_kind(options, cluster)
    fewest = sum(math.ceil(totals[kind] / number) for kind, number in largest.items())
    if fewest > num_layers:
        raise InfeasiblePlanError(
            f"a microbatch of {count(microbatch_size, 'sample')} "
            f"(parallel.num_microbatches={options.global_batch // microbatch_size}) is shared by at most "
            f"{count(max(largest.values()), 'device')}, so {count(sum(totals), 'device')} are "
            f"{fewest} stages, and the model has {count(num_layers, 'layer')}; set a smaller number"
        )


def check_experts(options: PlanOptions, cluster: AnyCluster, model: LayeredModel) -> None:
    """Raise `ConfigError` for experts that are to be split but are not there, or not so many."""
    if options.ep in (None, 1):
        return
    numbers = sorted(expert_counts(model))
    if not numbers:
        raise ConfigError(
            f"parallel.ep={options.ep} splits experts, and the model has none; leave it out, or take "
            f"model=moe"
        )
    if any(number % options.ep for number in numbers):
        experts = either([str(number) for number in numbers])
        divide = [d for d in divisors(numbers[0]) if not any(number % d for number in numbers)]
        fitting = [d for d in divide if fits(replace(options, ep=d), cluster)]
        raise ConfigError(
            f"parallel.ep={options.ep} does not divide the {experts} experts of the model; "
            f"set parallel.ep={_choice(fitting)}, or another model.experts"
        )


def memory_cures(
    options: PlanOptions, cluster: AnyCluster, num_parameters: int
) -> Callable[[float | None], str]:
    """What may lower a plan's memory, is allowed in its mode, and has not been tried by the search.

    Returns:
        The text, called with how many times as much memory is needed as there is; numbers are in
        proportion, and there are none where that is not known.
    """

    def text(times: float | None) -> str:
        smaller = "take a smaller model.size"
        if times is not None:
            fitting = large(int(num_parameters / times))
            smaller += f" (of about {fitting} parameters instead of {large(num_parameters)})"
        others = _other_cures(options, cluster, times)
        return f"what may help: {either([*_cures_of_mode(options, cluster), *others, smaller])}"

    return text


def _cures_of_mode(options: PlanOptions, cluster: AnyCluster) -> Iterator[str]:
    searches = options.mode == "auto"
    if searches:
        forced = {"recompute": options.recompute, "zero": options.zero}
        yield from (f"leave out parallel.{k}" for k, given in forced.items() if given is not None)
    elif options.recompute in (None, "none"):
        yield "set parallel.recompute=layer"
    if options.mode in ("zero", "manual") and options.zero != 3:
        yield "set parallel.zero=3"
    if options.mode == "manual":
        yield "raise parallel.tp or parallel.pp"
    if options.num_microbatches is not None:
        counts = microbatch_counts(options, cluster)
        more = sorted(number for number in counts if number > options.num_microbatches)
        if more:
            yield f"set parallel.num_microbatches={_choice(more)}"
    if options.mode == "data":
        yield "shard the state with parallel=zero"
    if options.mode in ("single", "data", "zero"):
        yield "take parallel=auto"


def _other_cures(options: PlanOptions, cluster: AnyCluster, times: float | None) -> Iterator[str]:
    """Besides another mode: more hosts, where they share the model, and a leaner optimizer."""
    if options.mode not in ("single", "data"):
        yield _more_hosts(cluster, times)
    if _keeps_moments(options):
        yield "take optimizer=adafactor"


def _more_hosts(cluster: AnyCluster, times: float | None) -> str:
    hosts = cluster.num_hosts
    if len(cluster.kinds) > 1:
        return "add hosts to cluster.groups"
    there = f"(there {'is' if hosts == 1 else 'are'} {hosts})"
    if times is None:
        return f"set more cluster.hosts {there}"
    return f"set cluster.hosts={max(hosts + 1, math.ceil(hosts * times))} or more {there}"


def _keeps_moments(options: PlanOptions) -> bool:
    """Whether the optimizer keeps two numbers for each parameter, as Adam does."""
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    kept = OptimizerFootprint(options.optimizer).kept(matrix)
    return kept.alike_bytes + kept.whole_bytes >= 2 * aval_bytes(matrix)
