"""What differs between the runs of a sweep: the keys of their configs that do not have one value.

A model brings fields, data and an optimizer of its own, so `model=gpt,wrn` makes many keys differ.
What follows from the option of a group is left out; what was given on the command line never is.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launcher.autopar.text.strict_yaml import load_yaml
from launcher.errors import ConfigError

# The groups, and which option decides about their fields, beside their own name.
_GROUPS = {
    "model": (), "cluster": (), "parallel": (), "data": ("model.name",), "optimizer": ("model.name",),
    "logger": (), "runtime": (),
}  # fmt: skip
# Where a run writes and how it is told of says nothing of what it is.
_ASIDE = ("logger.", "checkpoint.dir", "debug", "cluster.sources.")
_OVERRIDES = ".hydra/overrides.yaml"

Flat = Mapping[str, object]


def differing(runs: Sequence[tuple[Path, Mapping[str, object]]]) -> dict[str, list[str]]:
    """Return column -> the value of each run, as text; `model.name` is the column `model`."""
    flats = [_flat(config) for _, config in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    varying = [key for key in keys if _varies(key, flats) and not key.startswith(_ASIDE)]
    given = {key for folder, _ in runs for key in _given(folder)}
    # The options first: what follows from them is left out.
    varying.sort(key=lambda key: not _is_option(key))
    kept = [
        key for key in varying if key in given or not _follows(key, _deciding(key, varying), flats)
    ]
    return {key.removesuffix(".name"): [_text(flat.get(key)) for flat in flats] for key in kept}


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _varies(key: str, flats: Iterable[Flat]) -> bool:
    return len({_text(flat.get(key)) for flat in flats}) > 1


def _is_option(key: str) -> bool:
    group, _, field = key.partition(".")
    return field == "name" and group in _GROUPS


def _deciding(key: str, varying: Sequence[str]) -> list[str]:
    """The options that a key may follow from."""
    group, _, field = key.partition(".")
    if group not in _GROUPS or key == "model.size":
        return []
    own = [] if field == "name" else [f"{group}.name"]
    return [option for option in (*own, *_GROUPS[group]) if option in varying]


def _follows(key: str, options: Iterable[str], flats: Sequence[Flat]) -> bool:
    """Whether runs with the same option always have the same value."""
    for option in options:
        pairs = {(_text(flat.get(option)), _text(flat.get(key))) for flat in flats}
        if len(pairs) == len({chosen for chosen, _ in pairs}):
            return True
    return False


def _given(folder: Path) -> list[str]:
    """The keys of the command line, an option of a group as its name."""
    path = folder / _OVERRIDES
    if not path.exists():
        return []
    try:
        overrides = load_yaml(path, _OVERRIDES)
    except ConfigError:
        return []
    texts = (
        [text for text in overrides if isinstance(text, str)] if isinstance(overrides, list) else []
    )
    keys = [text.lstrip("+~").partition("=")[0] for text in texts]
    return [f"{key}.name" if key in _GROUPS else key for key in keys]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
