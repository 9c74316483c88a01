"""What is wrong with an override that Hydra would take, or would only say strange things of.

An override without a key; an option of a group that leaves the folders of the configs; a secret,
since Hydra writes all overrides to the run's folder. What else can be wrong is found when the config
is composed.
"""

from collections.abc import Sequence

from launcher.errors import ConfigError
from launcher.secrets import check_no_secret, is_secret_name

_VARIABLES = "hydra.job.env_set."
_PATHS = ("resume",)  # keys without a dot that are no groups, and may name any folder


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for the first override that names nothing, or something outside."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if not key.strip():
            raise ConfigError(f"{override!r} names no key: write key=value, such as seed=1")
        check_no_secret(key, override)
        _check_variable(key)
        is_group = "." not in key and key not in _PATHS
        if is_group and ".." in value.strip("'\"").split("/"):
            raise ConfigError(
                f"{override} leads out of the folders that configs are read from: give an option "
                f"of {key}, or name the folder with --config-dir=<folder>"
            )


def _check_variable(key: str) -> None:
    """What Hydra is to set in the environment stands in its own file too."""
    name = key.removeprefix(_VARIABLES)
    if name != key and is_secret_name(name):
        raise ConfigError(
            f"{key} would write a secret to the run's .hydra/hydra.yaml: leave it out, and set {name} "
            f"in the environment"
        )
