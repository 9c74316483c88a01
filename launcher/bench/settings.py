"""Reading a benchmark's `key=value` settings: every refusal is one line with the key and what it takes."""

from collections.abc import Iterable, Mapping, Sequence

from launcher.errors import ConfigError

Settings = Mapping[str, str]


def check_keys(benchmark: str, settings: Settings, keys: Iterable[str]) -> None:
    """Refuse a setting that the benchmark does not have."""
    keys = tuple(keys)
    unknown = sorted(set(settings) - set(keys))
    if unknown:
        raise ConfigError(f"{benchmark} has no key {unknown[0]!r}: it has {', '.join(keys)}")


def chosen(settings: Settings, key: str, known: Iterable[str]) -> list[str]:
    """The names that a setting lists, separated by commas; all known ones if it is left out."""
    known = tuple(known)
    if key not in settings:
        return list(known)
    names = settings[key].split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigError(f"{key}={wrong[0]!r}: choose from {', '.join(known)}")
    return names


def whole_numbers(settings: Settings, key: str, default: Sequence[int]) -> list[int]:
    """Numbers that are 1 or more, separated by commas."""
    texts = settings[key].split(",") if key in settings else map(str, default)
    return [whole_number({key: text}, key, default[0]) for text in texts]


def whole_number(settings: Settings, key: str, default: int) -> int:
    """A setting that is 1 or more."""
    text = settings.get(key, str(default))
    if not text.isdecimal() or not int(text):
        raise ConfigError(
            f"{key}={text!r} is no positive whole number: write for example {key}={default}"
        )
    return int(text)
