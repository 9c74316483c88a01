"""Keys and passwords: none may reach a file, a log or W&B's configuration.

Which texts are secret is told by the environment: the values of variables whose names end like
`WANDB_API_KEY`. No config key of ours takes a secret, since whoever needs one reads it from the
environment; a command line that brings one into the config is refused, and whatever is printed or
logged has the name of the variable in place of its value.
"""

import os
import re
from collections.abc import Iterator, Mapping

from launcher.errors import ConfigError

# A shorter value is no secret, or would be found in harmless texts.
_SHORTEST = 8
_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CREDENTIALS)", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a variable or a key of this name holds a secret: its last word says so."""
    return _NAMES.fullmatch(re.split(r"[_.\-]", name)[-1]) is not None


def redacted(text: str) -> str:
    """Return a text with `<NAME>` in place of each secret."""
    for name, value in _secrets():
        text = text.replace(value, f"<{name}>")
    return text


def check_no_secret(place: str, value: object) -> None:
    """Raise `ConfigError` if a value that would be written holds a secret."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_no_secret(f"{place}.{name}" if place else str(name), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_no_secret(f"{place}[{index}]", inner)
    elif isinstance(value, str):
        _check_text(place, value)


def _check_text(place: str, value: str) -> None:
    name = next((name for name, secret in _secrets() if secret in value), None)
    if name is not None:
        raise ConfigError(
            f"{place} holds the secret of the environment variable {name}, and would be written to "
            f"the run's files: leave it out; what needs {name} reads it from the environment"
        )


def _secrets() -> Iterator[tuple[str, str]]:
    """The secret variables of the environment, the longest values first: one may hold another."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and is_secret_name(name)
    ]
    return iter(sorted(found, key=lambda item: -len(item[1])))
