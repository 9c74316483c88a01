"""Say in one line what is wrong with a command line: the key, the value, and the cure.

Hydra and OmegaConf tell it over several lines and in their own terms; their exceptions carry the
key, the schema and the options, and this module makes a sentence of them. What it does not know
it passes on, folded into one line.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from launcher.config import SCHEMAS, Config
from launcher.errors import ConfigError

# What reading and composing raises for a user's mistakes; ValueError for those in Hydra's flags,
# RecursionError for brackets in brackets in brackets, OverflowError for an integer that no float holds.
USER_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError, OverflowError,
)  # fmt: skip

# Options that the interface has and this version has not.
LATER_OPTIONS = ("hydra/launcher/slurm",)

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list such as [a,b]",
    dict: "a mapping such as {a: 1}",
    types.NoneType: "null",
}
_SPECIAL = {
    "parallel.num_microbatches": "auto or a whole number",
    "train.trace_steps": "a list of steps such as [10]",
    "train.profile_steps": "a list of steps such as [20,21]",
    "plan.why_not": "a list of forced choices such as '[{pp: 1}, {num_microbatches: 8}]'",
}
_EXAMPLES = {"model.target": "model.target=my_package.my_module:build, a function that builds it"}

_LONG_OVERRIDE = 200

# What OmegaConf leaves in a message where it cannot show the value.
_PLACEHOLDERS = re.compile(r"'\$VALUE(_TYPE)?'")

# What a message of Hydra's says -> how we say it.
_FREQUENT = {
    "Ambiguous value for": "{given} has several values: add --multirun to sweep over them, "
    "or write a list as {key}=[...]",
    "Sweep parameters": "{given} has several values: add --multirun to sweep over them",
    "Could not append to config": "{given} is there already: write {bare}",
    "No match in the defaults list": "{given} is not among the defaults: write +{bare} to add it",
    "Could not delete from config": "{given} is not there with that value: leave it out",
    "Cannot merge DictConfig with ListConfig": "{given} is a mapping, and {key} takes a list: "
    "put it in brackets",
    "does not support deletion": "{given} cannot be taken out: give it a value",
}


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Turn what Hydra, OmegaConf or YAML raised into our one line."""
    return ConfigError(_source(error) + _sentence(error, overrides))


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    # Hydra raises its own error from OmegaConf's, and sometimes forgets to say "from".
    cause = error.__cause__ or error.__context__
    own = isinstance(error, InterpolationResolutionError)  # knows its key, its cause does not
    precise = cause if isinstance(cause, OmegaConfBaseException) and not own else error
    match precise:
        case OverrideParseException():
            return _unreadable(precise)
        case MissingConfigException(options=[_, *_]):
            return _unknown_option(precise, overrides)
        case ConfigAttributeError() | ConfigKeyError() if precise.full_key:
            return unknown_key(precise.full_key, precise.object_type, overrides)
        case MissingMandatoryValue() if precise.full_key:
            return _missing(precise.full_key)
        case InterpolationResolutionError() | GrammarParseError():
            return _unresolved(precise, overrides)
        case ValidationError() if precise.full_key:
            return _wrong_type(precise, overrides)
    return _folded(precise, overrides)


def _source(error: Exception) -> str:
    """Name the YAML file that Hydra was merging, where that is what it says."""
    found = re.match(r"In '([^']+)': \w+ raised while composing", str(error))
    return f"{found[1]}.yaml: " if found else ""


def unknown_key(full_key: str, schema: type | None, overrides: Sequence[str]) -> str:
    """Say that no schema has this key, and which one was perhaps meant."""
    given = _given(full_key, overrides) or full_key
    key = given.lstrip("+").partition("=")[0]
    if schema is dict:
        return f"{given} is a new entry: write +{given.lstrip('+')} to add it"
    owners = _options_with(key)
    if owners:
        choices = " or ".join(owners)
        return f"{given} is a key of {choices} only: leave it out, or take {choices}"
    return f"{given}: there is no key {key}: {_did_you_mean(key, full_key, schema)}"


def _did_you_mean(key: str, full_key: str, schema: type | None) -> str:
    parent, _, name = full_key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    rest = key.removeprefix(full_key)  # what follows the mistyped part, as in trian.steps
    everywhere = dict.fromkeys(_all_keys(Config))
    siblings = [prefix + near for near in difflib.get_close_matches(name, _fields(schema), n=2)]
    nearest = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    near = (
        [mended + rest for mended in siblings if mended + rest in _all_keys(schema, prefix)]
        or (rest and nearest)
        or siblings
        or [known for known in everywhere if known.rpartition(".")[2] == key]
        or nearest
    )
    if near:
        return f"did you mean {' or '.join(near)}?"
    if parent and _fields(schema):
        return f"{parent} has {', '.join(_fields(schema))}"
    return "see all keys with --cfg job"


def _fields(schema: type | None) -> tuple[str, ...]:
    if schema is None or not dataclasses.is_dataclass(schema):
        return ()
    return tuple(field.name for field in dataclasses.fields(schema))


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every key of the config, those of each group's alternatives included."""
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        yield key
        alternatives = [schema for (group, _), schema in SCHEMAS.items() if group == key]
        for nested in (field.type, *typing.get_args(field.type), *alternatives):
            if dataclasses.is_dataclass(nested):
                yield from _all_keys(nested, f"{key}.")


def _options_with(key: str) -> list[str]:
    """Name the options of a group that have this key, where the chosen one has not."""
    group, _, name = key.partition(".")
    return [
        f"{group}={option}"
        for (known, option), schema in SCHEMAS.items()
        if known == group and name in _fields(schema)
    ]


def _given(full_key: str, overrides: Iterable[str]) -> str | None:
    """Find the override that set this key, or a key inside it; the last one counts."""
    for override in reversed(tuple(overrides)):
        key = override.lstrip("+~").partition("=")[0]
        if key == full_key or key.startswith(f"{full_key}."):
            return override
    return None


def _unreadable(error: OverrideParseException) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"{error.override} has no value: write {key}=<value>"
    reason = error.message.splitlines()[0]
    return (
        f"{error.override} cannot be read ({reason}): a value with =, commas, braces or spaces "
        f"needs quotes inside the shell's, such as \"{key}='{value}'\""
    )


def _config_of(override: str) -> str:
    """The file that an override chooses, as Hydra names it."""
    return override.lstrip("+").replace("=", "/", 1)


def _unknown_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    file, options = error.missing_cfg_file, list(error.options)
    given = next((text for text in overrides if _config_of(text) == file), None)
    if given is None:  # named in a YAML file
        given = "=".join(file.rsplit("/", 1))
    given = given.lstrip("+")
    group, _, option = given.partition("=")
    if error.missing_cfg_file in LATER_OPTIONS:
        return f"{given} is not in this version yet: take one of {', '.join(options)}"
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"did you mean {group}={near[0]}? There are" if near else "take one of"
    return f"{given} is unknown: {hint} {', '.join(options)}"


def _missing(full_key: str) -> str:
    options = sorted(option for group, option in SCHEMAS if group == full_key)
    example = " or ".join(f"{full_key}={option}" for option in options) or _EXAMPLES.get(
        full_key, f"{full_key}=<value>"
    )
    return f"{full_key} has no value: give {example}"


def _wrong_type(error: ValidationError, overrides: Sequence[str]) -> str:
    key = error.full_key
    given = _given(key, overrides)
    if given is None:  # written in a YAML file
        reason = str(error).splitlines()[0]
        return f"{key}: {reason}: give {_expectation(error)}"
    if given.lstrip("+").partition("=")[0] != key:
        return f"{given}: {key} has no keys of its own: give {key}={_expectation(error)}"
    return f"{given} is of the wrong type: give {_expectation(error)}"


def _expectation(error: ValidationError) -> str:
    """Say what a field takes, from its schema's annotation."""
    if error.full_key in _SPECIAL:
        return _SPECIAL[error.full_key]
    annotation = _annotation(error)
    if dataclasses.is_dataclass(annotation):
        return f"one of its keys, such as {error.full_key}.{_fields(annotation)[0]}=<value>"
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(annotation) if is_union else (annotation,)
    kinds = (typing.get_origin(kind) or kind for kind in alternatives)
    return " or ".join(_EXPECTED.get(kind, "another value") for kind in kinds)


def _annotation(error: ValidationError) -> typing.Any:
    """Find the annotation of the field, of ours or of Hydra's schemas."""
    if not dataclasses.is_dataclass(error.object_type):  # an entry of a dict[str, float]
        return (typing.Any, *typing.get_args(error.ref_type))[-1]
    name = error.full_key.rpartition(".")[2]
    known = {field.name: field.type for field in dataclasses.fields(error.object_type)}
    return known.get(name, typing.Any)


def _unresolved(error: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    """Say which value refers to something that is not there, or to itself."""
    reason = _PLACEHOLDERS.sub("its value", str(error).splitlines()[0])
    given = _given(error.full_key, overrides) if error.full_key else None
    if given is None:
        given = next((text for text in overrides if "${" in text), error.full_key or "a value")
    return (
        f"{given} cannot be resolved ({reason}): correct the name in ${{...}}, or write the value"
    )


def _folded(error: Exception, overrides: Sequence[str]) -> str:
    """Fold a message into one line; Hydra's frequent ones have a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "recursion depth" in text:
        longest = max(overrides, key=len, default="")
        if len(longest) > _LONG_OVERRIDE:
            return f"{longest[:60]}... has too many brackets inside one another: write fewer"
        return (
            f"a config includes itself, or has too many brackets inside one another (command line: "
            f"{' '.join(overrides) or 'no overrides'}): look at its defaults list"
        )
    named = re.search(r"'(\S+)'|full_key: (\S+)", text)
    given = _given((named[1] or named[2]).partition("=")[0], overrides) if named else None
    mixed = re.search(r"\b(\w+)Config is not a subclass of (\w+)Config", text)
    if mixed:
        return (
            f"{mixed[1].lower()} and {mixed[2].lower()} are options of one group, of which a run has "
            f"one: choose one of them (command line: {' '.join(overrides)})"
        )
    for sign, sentence in _FREQUENT.items():
        if given is not None and sign in text:
            bare = given.lstrip("+~")
            return sentence.format(given=given, bare=bare, key=bare.partition("=")[0])
    return f"{text} (command line: {' '.join(overrides) or 'no overrides'}): correct it there"
