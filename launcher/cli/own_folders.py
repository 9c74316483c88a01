"""Folders of configs that lie outside this repository: a team's own recipes, models and clusters.

They are named by `LAUNCHER_CONF` in the environment (several with a colon between them), by
`hydra.searchpath=[file://FOLDER]`, or by `--config-dir`. Options of the first two stand behind ours, so
that no name of ours changes its meaning; `--config-dir` is Hydra's way to put its options in front.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from launcher.errors import ConfigError

VARIABLE = "LAUNCHER_CONF"
_SEARCHPATH = "hydra.searchpath="
_FOLDER = re.compile(r"file://([^\s,'\"\]]+)")


class OwnFolders(SearchPathPlugin):
    """Puts the folders of the environment on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them."""
        for folder in folders_of(os.environ):
            search_path.append(provider=VARIABLE, path=f"file://{folder}")


def register() -> None:
    """Let Hydra know of them, wherever it composes."""
    Plugins.instance().register(OwnFolders)


def folders_of(environment: Mapping[str, str]) -> list[pathlib.Path]:
    """The folders of the environment."""
    given = environment.get(VARIABLE, "").split(":")
    return [pathlib.Path(folder).expanduser().absolute() for folder in given if folder]


def checked(environment: Mapping[str, str], overrides: Sequence[str]) -> list[pathlib.Path]:
    """The folders of the environment and of `hydra.searchpath`, all of which are there.

    Raises:
        ConfigError: one is not; Hydra would leave it out.
    """
    named = [(VARIABLE, folder) for folder in folders_of(environment)]
    for text in overrides:
        if text.lstrip("+").startswith(_SEARCHPATH) and "${" not in text:
            named += [("hydra.searchpath", pathlib.Path(path)) for path in _FOLDER.findall(text)]
    for key, folder in named:
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder ({key}): name one that has recipe/, model/ or cluster/ with YAML "
                f"files in it, or leave it out"
            )
    return [folder for _, folder in named]
