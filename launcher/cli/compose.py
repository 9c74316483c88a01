"""Turn a command line into typed, checked configs, without writing anything.

Hydra by itself makes the run's folder before the program can look at its config. So the command
line is composed here first, by the same loader and with the same search path, and handed to Hydra
only when every config that it stands for (several, in a sweep) is sound. `hydra._internal` has
what Hydra's own entry point uses for that; there is no public way, and the dependency is pinned
to 1.3.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from launcher.checks import validate
from launcher.cli import own_folders
from launcher.cli.explain import USER_ERRORS, explain, unknown_key
from launcher.cli.overrides import check_overrides
from launcher.cli.yaml_files import check_files
from launcher.config import Config, conf_dir, register_schemas
from launcher.errors import ConfigError
from launcher.secrets import check_no_literal, check_no_secret

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
# OSError: a name that no file can have.
COMPOSING_ERRORS = (*USER_ERRORS, OSError)
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What Hydra's parser makes of the arguments."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    only_informs: bool = False  # --help, --cfg, --info, shell completion: nothing runs
    completes: bool = False
    config_path: str | None = None
    config_name: str | None = None
    config_dir: str | None = None

    def config_flags(self) -> tuple[str, ...]:
        """Return the flags that say where the config comes from."""
        flags = {
            "--config-path": self.config_path,
            "--config-name": self.config_name,
            "--config-dir": self.config_dir,
        }
        return tuple(f"{flag}={value}" for flag, value in flags.items() if value is not None)


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse the arguments as Hydra will."""
    parser = get_args_parser()
    parser.error = _reject_arguments
    flags = parser.parse_args(list(arguments))
    return CommandLine(
        overrides=tuple(flags.overrides),
        multirun=flags.multirun,
        only_informs=_only_informs(flags),
        completes=flags.shell_completion,
        config_path=flags.config_path,
        config_name=flags.config_name,
        config_dir=flags.config_dir,
    )


def _only_informs(flags: argparse.Namespace) -> bool:
    asked = (flags.help, flags.hydra_help, flags.shell_completion, flags.cfg, flags.info)
    return any(asked) or flags.resolve


def _reject_arguments(message: str) -> NoReturn:
    raise ConfigError(
        f"{message}: the launcher takes key=value, and Hydra's flags before or after all of them "
        f"(see --help)"
    )


def prepare() -> None:
    """Tell Hydra of our schemas, and of the folders that a user keeps configs in."""
    register_schemas()
    own_folders.register()


def load(overrides: Sequence[str] = ()) -> Config:
    """Return the config of `python -m launcher <overrides>`, for tests and Python users."""
    line = CommandLine(overrides=tuple(overrides))
    with _loader(line) as loader:
        return _compose_point(loader, line, line.overrides)[0]


def check(line: CommandLine) -> pathlib.Path | None:
    """Check every config that a command line stands for; return its folder, None for a sweep."""
    check_overrides(line.overrides)
    with _loader(line) as loader:
        try:
            master = _load(loader, line, line.overrides, RunMode.MULTIRUN)
            sweeps = line.multirun or master.hydra.mode == RunMode.MULTIRUN
            points = _sweep_points(loader, line, master) if sweeps else [line.overrides]
        except COMPOSING_ERRORS as error:
            raise explain(error, line.overrides) from error
        run_dirs = [_compose_point(loader, line, point)[1] for point in points]
    return None if sweeps else run_dirs[0]


@contextlib.contextmanager
def _loader(line: CommandLine) -> Iterator[ConfigLoader]:
    """Build the loader that Hydra's entry point would build for this command line."""
    if line.config_path is not None:
        check_files(pathlib.Path(line.config_path), line.config_name or CONFIG_NAME, line.overrides)
    for folder in own_folders.checked(os.environ, line.overrides):
        check_files(folder, line.config_name or CONFIG_NAME, line.overrides)
    prepare()
    version.setbase(VERSION_BASE)
    search_path = create_automatic_config_search_path(
        calling_file=None,
        calling_module=__name__,
        config_path=line.config_path or str(conf_dir()),
    )
    if line.config_dir is not None:
        folder = pathlib.Path(line.config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir={line.config_dir} is no folder: correct the path")
        check_files(folder, line.config_name or CONFIG_NAME, line.overrides)
        anchor = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=anchor)
    hydra = Hydra.create_main_hydra2(task_name="launcher", config_search_path=search_path)
    try:
        yield hydra.config_loader
    finally:
        GlobalHydra.instance().clear()


def _load(
    loader: ConfigLoader, line: CommandLine, overrides: Sequence[str], mode: RunMode
) -> DictConfig:
    return loader.load_configuration(
        config_name=line.config_name or CONFIG_NAME,
        overrides=list(overrides),
        run_mode=mode,
        validate_sweep_overrides=mode == RunMode.RUN,
    )


def _sweep_points(
    loader: ConfigLoader, line: CommandLine, master: DictConfig
) -> list[tuple[str, ...]]:
    """List the overrides of each point, as Hydra's basic sweeper does.

    Another sweeper chooses its points as it goes; then only what the points share is checked now.
    """
    parser = OverridesParser.create(config_loader=loader)
    basic = master.hydra.sweeper.get("_target_") == BASIC_SWEEPER
    params = master.hydra.sweeper.get("params") or {} if basic else {}
    choices: dict[str, list[str]] = {}
    for override in parser.parse_overrides(
        [*(f"{key}={value}" for key, value in params.items()), *line.overrides]
    ):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [override.input_line]
        elif basic and override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        elif basic:
            raise ConfigError(
                f"{override.input_line} is no list of values, and Hydra's basic sweeper takes "
                f"nothing else: give one, such as {key}=1,2,3"
            )
    for key, values in choices.items():
        if not values:
            given = next(text for text in reversed(line.overrides) if text.startswith(key))
            raise ConfigError(
                f"{given} stands for 0 values, so that the sweep has no run: give a list or a "
                f"range of 1 or more, such as {key}=1,2,3"
            )
    return list(itertools.product(*choices.values()))


def _compose_point(
    loader: ConfigLoader, line: CommandLine, overrides: Sequence[str]
) -> tuple[Config, pathlib.Path]:
    """Compose and check one run; return its config and the folder it would write to."""
    try:
        composed = _load(loader, line, overrides, RunMode.RUN)
        run_dir = _prepare_interpolations(composed)
        task = composed.copy()
        with open_dict(task):
            del task["hydra"]
        return to_config(task, overrides), run_dir
    except COMPOSING_ERRORS as error:
        raise explain(error, overrides) from error


def _prepare_interpolations(composed: DictConfig) -> pathlib.Path:
    """Fill in what Hydra knows only when it runs, so that `${hydra:...}` has values already."""
    with open_dict(composed):
        composed.hydra.job.num = 0
        composed.hydra.job.id = "0"
    HydraConfig.instance().set_config(composed)
    if not composed.hydra.run.dir:
        raise ConfigError("hydra.run.dir='' names no folder: give one, or . for this one")
    check_no_secret("hydra.run.dir", composed.hydra.run.dir)
    run_dir = pathlib.Path(composed.hydra.run.dir).absolute()
    with read_write(composed.hydra.runtime), open_dict(composed.hydra.runtime):
        composed.hydra.runtime.output_dir = str(run_dir)
    return run_dir


def to_config(task: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Turn a composed config into typed, checked objects."""
    try:
        config = OmegaConf.to_object(task)
    except USER_ERRORS as error:
        raise explain(error, overrides) from error
    if not isinstance(config, Config):
        raise ConfigError(
            "the primary config does not start from the launcher's schema: "
            "let its defaults list begin with `- config` or `- schema`"
        )
    _reject_unknown_keys(task, "", overrides)
    validate(config)
    check_no_secret("", dataclasses.asdict(config))
    check_no_literal("", dataclasses.asdict(config))
    return config


def _reject_unknown_keys(node: DictConfig, prefix: str, overrides: Sequence[str]) -> None:
    """Reject what `+key=value` added and no schema has: OmegaConf would drop it in silence."""
    schema = OmegaConf.get_type(node)
    known = None if schema is dict else {field.name for field in dataclasses.fields(schema)}
    for name, child in node.items():
        if known is not None and name not in known:
            raise ConfigError(unknown_key(f"{prefix}{name}", schema, overrides))
        if isinstance(child, DictConfig):
            _reject_unknown_keys(child, f"{prefix}{name}.", overrides)
