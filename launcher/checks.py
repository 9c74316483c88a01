"""Which fields of a config contradict one another; what each may hold by itself is in `limits`.

Only what the config alone can tell: whether a size exists, or a degree divides a cluster's
devices, is checked where those are known. Every message names the key and its value, and says
what to do.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from launcher.config import SCHEMAS, Config, CustomConfig, GptConfig, MoeConfig, ParallelConfig
from launcher.errors import ConfigError
from launcher.limits import check_value

# What each kind of parallelism allows: key -> the values beside null that do not contradict it.
_ONE, _NO_ZERO = (1,), (0,)
ALLOWED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "single": {"dp": _ONE, "tp": _ONE, "pp": _ONE, "ep": _ONE, "zero": _NO_ZERO},
    "data": {"tp": _ONE, "pp": _ONE, "ep": _ONE, "zero": _NO_ZERO},
    "zero": {"tp": _ONE, "pp": _ONE, "ep": _ONE, "zero": (1, 2, 3)},
    "manual": {},
    "auto": {},
    "from_file": dict.fromkeys(
        ("dp", "tp", "pp", "ep", "zero", "recompute", "schedule", "virtual_stages"), ()
    ),
}

# What an entry of plan.why_not may force: name -> the type of its value.
FORCED: Mapping[str, type] = {
    "dp": int, "tp": int, "pp": int, "ep": int, "zero": int, "recompute": str, "schedule": str,
    "virtual_stages": int, "num_microbatches": int,
}  # fmt: skip


def validate(config: Config) -> None:
    """Raise `ConfigError` for the first value that cannot be, or that contradicts another."""
    _check_names(config)
    for key, value in _flat("", dataclasses.asdict(config)):
        check_value(key, value)
    _check_parallel(config.parallel)
    for index, entry in enumerate(config.plan.why_not):
        _check_forced(f"plan.why_not[{index}]", entry, config.parallel)
    _check_batch(config)
    _check_model(config)
    _check_watched(config)
    _check_end(config)
    _check_profile(config)
    _check_resume(config)
    _check_runtime(config)


def _check_names(config: Config) -> None:
    """Where the options of a group have schemas of their own, the name says which one it is."""
    chosen = {"model": config.model, "data": config.data, "optimizer": config.optimizer}
    for (group, name), schema in SCHEMAS.items():
        if type(chosen[group]) is schema and chosen[group].name != name:
            raise ConfigError(
                f"{group}.name={chosen[group].name} contradicts {group}={name}: "
                f"leave it out, or take {group}={chosen[group].name}"
            )


def _flat(prefix: str, tree: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield (key, value) of every leaf, with keys as on the command line."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _check_parallel(parallel: ParallelConfig) -> None:
    name, count = parallel.name, parallel.num_microbatches
    for field, allowed in ALLOWED[name].items():
        value = dataclasses.asdict(parallel)[field]
        if value is not None and value not in allowed:
            raise ConfigError(_contradiction(name, field, value))
    if isinstance(count, str) and count != "auto":
        raise ConfigError(
            f"parallel.num_microbatches={count} is neither auto nor a number: "
            f"give parallel.num_microbatches=auto or a number such as 4"
        )
    if name == "from_file" and count != "auto":
        raise ConfigError(_contradiction(name, "num_microbatches", count))
    _check_virtual_stages(parallel)
    _check_path(parallel)


def _check_virtual_stages(parallel: ParallelConfig) -> None:
    """The interleaved schedule has several stages on each of several submeshes, the others one."""
    v, pp, count = parallel.virtual_stages, parallel.pp, parallel.num_microbatches
    schedule = f"parallel.schedule={parallel.schedule or 'null'}"
    is_one_submesh = parallel.name in ("single", "data", "zero")
    if parallel.schedule != "interleaved":
        if v not in (None, 1):
            raise ConfigError(_no_virtual_stages(parallel, is_one_submesh=is_one_submesh))
        return
    if is_one_submesh:
        raise ConfigError(
            f"{schedule} contradicts parallel={parallel.name}, which has one submesh: leave it out, or "
            f"take parallel=manual parallel.pp=2 {schedule}"
        )
    if v == 1:
        raise ConfigError(
            f"parallel.virtual_stages=1 contradicts {schedule}, which takes 2 or more: leave it out, "
            f"or take parallel.schedule=1f1b"
        )
    if parallel.name == "manual" and pp in (None, 1):
        raise ConfigError(
            f"{schedule} needs several submeshes, and parallel.pp={pp or 'null'} makes one: give "
            f"parallel.pp=2 or more, or take parallel.schedule=1f1b"
        )
    if pp is not None and count != "auto" and int(count) % pp:
        raise ConfigError(
            f"parallel.num_microbatches={count} is no multiple of parallel.pp={pp}, by which {schedule} "
            f"groups them: give a multiple, such as "
            f"parallel.num_microbatches={_near_multiple(int(count), pp)}"
        )


def _no_virtual_stages(parallel: ParallelConfig, *, is_one_submesh: bool) -> str:
    """Say that there is one stage on a submesh, and what would have several."""
    given = f"parallel.virtual_stages={parallel.virtual_stages}"
    cure = "parallel.schedule=interleaved"
    if parallel.name == "manual" and parallel.pp in (None, 1):
        cure += " with parallel.pp=2 or more"
    if is_one_submesh:
        return (
            f"{given} contradicts parallel={parallel.name}, which has one submesh with one stage: leave "
            f"it out, or take parallel=manual parallel.pp=2 {cure}"
        )
    return (
        f"{given} contradicts parallel.schedule={parallel.schedule or 'null'}, which has one stage on a "
        f"submesh: leave it out, or take {cure}"
    )


def _contradiction(name: str, field: str, value: object) -> str:
    given = f"parallel.{field}={value}"
    if name == "from_file":
        return f"{given} contradicts parallel=from_file, whose plan file decides it: leave it out"
    if field == "zero" and name != "zero":
        cure = f"take parallel=zero {given}"
    elif field == "zero":
        cure = "take parallel=data"
    else:
        cure = f"take parallel=manual {given}"
    return f"{given} contradicts parallel={name}: leave it out, or {cure}"


def _check_path(parallel: ParallelConfig) -> None:
    if parallel.name == "from_file" and parallel.path is None:
        raise ConfigError(
            "parallel=from_file needs a plan, and parallel.path=null: "
            "give parallel.path=<plan.json of a run>"
        )
    if parallel.name != "from_file" and parallel.path is not None:
        raise ConfigError(
            f"parallel.path={parallel.path} contradicts parallel={parallel.name}: "
            f"leave it out, or take parallel=from_file"
        )


def _check_forced(place: str, entry: object, parallel: ParallelConfig) -> None:
    """An entry of plan.why_not, and that it goes with what the run forces itself."""
    if not isinstance(entry, dict) or not entry:
        raise ConfigError(f"{place}={entry} forces nothing: give a mapping, such as {{pp: 1}}")
    for name, value in entry.items():
        if name not in FORCED:
            raise ConfigError(
                f"{place}.{name}={value}: there is no such choice: take one of {', '.join(FORCED)}"
            )
        if type(value) is not FORCED[name]:
            expected = "a whole number" if FORCED[name] is int else "a name"
            raise ConfigError(f"{place}.{name}={value} is of the wrong type: give {expected}")
    try:
        for name, value in entry.items():
            check_value(f"parallel.{name}", value)
        free = parallel if parallel.name == "auto" else ParallelConfig()
        _check_parallel(dataclasses.replace(free, **entry))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _check_batch(config: Config) -> None:
    batch, count = config.train.global_batch, config.parallel.num_microbatches
    if batch is None or isinstance(count, str):
        return
    parts, keys = count, f"parallel.num_microbatches={count}"
    if config.parallel.dp is not None:
        parts *= config.parallel.dp
        keys += f" times parallel.dp={config.parallel.dp}"
    if batch % parts:
        raise ConfigError(
            f"train.global_batch={batch} does not divide by {parts} ({keys}): "
            f"give a multiple, such as train.global_batch={_near_multiple(batch, parts)}"
        )


def _check_model(config: Config) -> None:
    match config.model:
        case GptConfig(hidden=int(hidden), heads=int(heads)) if hidden % heads:
            _reject_heads(hidden, heads)
        case MoeConfig(hidden=int(hidden), heads=int(heads)) if hidden % heads:
            _reject_heads(hidden, heads)
        case MoeConfig(capacity_factor=factor) if factor <= 0:
            raise ConfigError(
                f"model.capacity_factor={factor} leaves the experts no room: "
                f"give a number above 0, such as 2.0"
            )
        case CustomConfig(target=target) if not _names_function(target):
            raise ConfigError(
                f"model.target={target} is not of the form package.module:function: "
                f"give the function that builds the model, such as my_package.my_module:build"
            )


def _check_watched(config: Config) -> None:
    """Steps that are to be traced or profiled."""
    steps = config.train.steps
    asked = {
        "train.trace_steps": config.train.trace_steps,
        "train.profile_steps": config.train.profile_steps,
    }
    for key, numbers in asked.items():
        given = f"{key}={_list(numbers)}"
        if numbers and config.mode != "train":
            raise ConfigError(
                f"{given} contradicts mode={config.mode}, which runs no step: "
                f"leave it out, or take mode=train"
            )
        outside = [number for number in numbers if not 1 <= number <= steps]
        if outside:
            raise ConfigError(
                f"{given} names step {outside[0]}, and train.steps={steps}: "
                f"give steps from 1 to {steps}"
            )
    both = sorted(set(config.train.trace_steps) & set(config.train.profile_steps))
    if both:
        raise ConfigError(
            f"step {both[0]} is in train.trace_steps={_list(config.train.trace_steps)}, which waits "
            f"after every instruction, and in "
            f"train.profile_steps={_list(config.train.profile_steps)}, which would show that "
            f"waiting: give it to one of them"
        )


def _list(numbers: list[int]) -> str:
    """As on a command line."""
    return f"[{','.join(map(str, numbers))}]"


def _check_end(config: Config) -> None:
    """What a run does after its last step."""
    if config.mode == "eval" and config.train.eval_batches == 0:
        raise ConfigError("mode=eval has nothing to do with train.eval_batches=0: give 1 or more")
    if config.mode == "eval" and config.train.export_weights:
        raise ConfigError(
            "train.export_weights=true would write the weights that mode=eval was given: "
            "leave it out, or take mode=train"
        )
    if config.train.sample_tokens and not config.train.sample_prompt:
        raise ConfigError(
            f"train.sample_tokens={config.train.sample_tokens} needs something to go on from, and "
            f"train.sample_prompt is empty: give a text, such as train.sample_prompt='The '"
        )


def _check_resume(config: Config) -> None:
    """Where a run begins."""
    given = f"resume={config.resume}"
    computes = config.mode in ("train", "eval")
    for key, is_set in (
        (given, config.resume not in ("auto", "none")),
        ("resume_weights_only=true", config.resume_weights_only),
        ("replan=true", config.replan),
    ):
        if is_set and not computes:
            raise ConfigError(
                f"{key} contradicts mode={config.mode}, which resumes nothing: leave it out, or take "
                f"mode=train"
            )
    if config.resume == "none" and config.resume_weights_only:
        raise ConfigError(
            "resume_weights_only=true contradicts resume=none: give resume=PATH, of the checkpoint or "
            "the run whose weights to take"
        )
    if config.model.weights is not None and (config.resume != "auto" or config.resume_weights_only):
        raise ConfigError(
            f"model.weights={config.model.weights} contradicts {given}"
            f"{' resume_weights_only=true' if config.resume_weights_only else ''}: the weights are those "
            f"of one or the other: leave one out"
        )


def _check_profile(config: Config) -> None:
    """What mode=profile measures, and where it writes."""
    given = dataclasses.asdict(config.profile)
    for field in sorted(given):
        if config.mode != "profile" and given[field] is not None:
            raise ConfigError(
                f"profile.{field}={given[field]} contradicts mode={config.mode}, which measures "
                f"nothing: leave it out, or take mode=profile"
            )
    if config.mode == "profile" and config.runtime.name == "emulate":
        raise ConfigError(
            "runtime=emulate contradicts mode=profile, which would measure this CPU in place of "
            f"cluster={config.cluster.name}: leave it out, or take cluster=cpu8"
        )


def _check_runtime(config: Config) -> None:
    """Who runs the plan, and what several processes cannot do yet."""
    runtime = config.runtime
    address = f"runtime.address={runtime.address}"
    is_given = runtime.address not in (None, "auto")
    if is_given and not _is_host_and_port(runtime.address):
        raise ConfigError(
            f"{address} is not of the form host:port: give that of the head node, such as "
            f"runtime.address=10.0.0.1:6379 (`ray status` on it shows it), auto or null"
        )
    if is_given and runtime.name in ("local", "emulate"):
        raise ConfigError(
            f"{address} contradicts runtime={runtime.name}, which runs in this process: leave it out, or "
            f"take runtime=ray"
        )
    if runtime.name != "ray":
        return
    if config.mode in ("eval", "profile"):
        raise ConfigError(
            f"runtime=ray contradicts mode={config.mode}, which runs in one process: leave it out"
        )
    for key, steps in (
        ("train.trace_steps", config.train.trace_steps),
        ("train.profile_steps", config.train.profile_steps),
    ):
        if steps:
            raise ConfigError(
                f"{key}={_list(steps)} contradicts runtime=ray, as only the steps of one process are "
                f"watched: leave it out, or take runtime=emulate"
            )


def _is_host_and_port(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    return bool(colon and host) and "/" not in address and port.isdecimal() and int(port) < 2**16


def _reject_heads(hidden: int, heads: int) -> None:
    raise ConfigError(
        f"model.hidden={hidden} does not divide by model.heads={heads}: "
        f"give a multiple, such as model.hidden={_near_multiple(hidden, heads)}"
    )


def _near_multiple(value: int, divisor: int) -> int:
    return max(1, round(value / divisor)) * divisor


def _names_function(target: str) -> bool:
    module, colon, function = target.partition(":")
    return (
        bool(colon)
        and function.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )
