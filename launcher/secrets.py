"""Keys and passwords: none may reach a file, a log or W&B's configuration.

Which texts are secret is told by the environment: the values of variables whose names end like
`WANDB_API_KEY`. No config key of ours takes a secret, since whoever needs one reads it from the
environment; a command line that brings one into the config is refused, and whatever is printed or
logged has the name of the variable in place of its value.

A secret may also stand in a config as it is, where a config takes anything: among the arguments of a user's
model. That is told by its form, or by the name that it is given; what only might be one is let through.
"""

import os
import re
from collections.abc import Iterator, Mapping

from launcher.errors import ConfigError

# A shorter value is no secret, or would be found in harmless texts.
_SHORTEST = 8
# Forms that only keys have, by those who give them out.
_FORMS = re.compile(
    r"sk-[\w-]{20,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Last words of names that hold nothing else, and how a value looks where a name could mean something else
# (`label_key: input_ids`, `eos_token: <|endoftext|>`).
_SURE_NAMES = re.compile(
    r"(.*[_.\-])?(PASSWORD|PASSWD|SECRET|CREDENTIALS?|(API|ACCESS|SECRET|PRIVATE)[_\-]?KEY"
    r"|(API|ACCESS|AUTH|BEARER)[_\-]?TOKEN)",
    re.IGNORECASE,
)
_RANDOM = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])[\w+/=.\-]{16,}")
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
    """Raise `ConfigError` if a value that would be written holds a secret of the environment."""
    for inner, text in _texts(place, value):
        name = next((name for name, secret in _secrets() if secret in text), None)
        if name is not None:
            raise ConfigError(
                f"{inner} holds the secret of the environment variable {name}, and would be written to "
                f"the run's files: leave it out; what needs {name} reads it from the environment"
            )


def check_no_literal(place: str, value: object) -> None:
    """Raise `ConfigError` if a value that would be written looks like a secret itself."""
    for inner, text in _texts(place, value):
        if _is_literal(re.sub(r".*\.|\[.*", "", inner), text):
            raise ConfigError(
                f"{inner} looks like a key or a password, and would be written to the run's files: leave "
                f"it out, and read it from an environment variable where it is needed"
            )


def _texts(place: str, value: object) -> Iterator[tuple[str, str]]:
    """All texts in a value, with their places."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(f"{place}.{name}" if place else str(name), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(f"{place}[{index}]", inner)
    elif isinstance(value, str):
        yield place, value


def _is_literal(name: str, value: str) -> bool:
    """Whether a value of this name is a secret itself."""
    if _FORMS.search(value):
        return True
    if _SURE_NAMES.fullmatch(name):
        return len(value) >= _SHORTEST
    return is_secret_name(name) and _RANDOM.fullmatch(value) is not None


def _secrets() -> Iterator[tuple[str, str]]:
    """The secret variables of the environment, the longest values first: one may hold another."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and is_secret_name(name)
    ]
    return iter(sorted(found, key=lambda item: -len(item[1])))
