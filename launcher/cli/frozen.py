"""Read the config of a run back from its folder, as it was composed."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from launcher.cli.compose import to_config
from launcher.cli.explain import USER_ERRORS
from launcher.cli.run_folder import CONFIG_FILE
from launcher.config import SCHEMAS, Config
from launcher.errors import ConfigError
from launcher.regular_file import read_regular

_LARGEST_BYTES = 2**22


def read_config(run_dir: Path) -> Config:
    """Return the config that a run's folder has. Neither `conf/` nor a command line is asked."""
    path = run_dir / CONFIG_FILE
    try:
        data = read_regular(path, _LARGEST_BYTES)
        tree = yaml.safe_load(data or b"")
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): submit the run again") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is no config of a run: submit the run again")
    try:
        return to_config(_with_schemas(tree))
    except USER_ERRORS as error:
        raise ConfigError(
            f"{path} has a value that no run can have ({type(error).__name__}): submit the run again"
        ) from error


def _with_schemas(tree: dict) -> DictConfig:
    """The same values, typed by the schemas that Hydra would have taken."""
    config = OmegaConf.structured(Config)
    for (group, name), schema in SCHEMAS.items():
        given = tree.get(group)
        if isinstance(given, dict) and given.get("name") == name:
            config[group] = OmegaConf.structured(schema)
    return OmegaConf.merge(config, OmegaConf.create(tree))
