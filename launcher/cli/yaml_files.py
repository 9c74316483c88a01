"""Look at the YAML files of a user's config folder before Hydra reads them.

Hydra opens a pipe and waits, and it copies what an alias stands for each time it is named, so that
a few lines can ask for more memory than there is. What the files say is not judged here.
"""

import pathlib
from collections.abc import Sequence

import yaml

from launcher.errors import ConfigError
from launcher.regular_file import read_regular

_LARGEST_BYTES = 2**20
_MOST_NODES = 100_000  # with all aliases written out


def check_files(folder: pathlib.Path, name: str, overrides: Sequence[str]) -> None:
    """Check the files of a folder that a command line names: the config, and options of groups."""
    chosen = [override.lstrip("+").replace("=", "/", 1) for override in overrides]
    for option in (name, *chosen):
        path = folder / f"{option}.yaml"
        if len(option) < 200 and path.exists():
            _check_file(path)


def _check_file(path: pathlib.Path) -> None:
    try:
        data = read_regular(path, _LARGEST_BYTES)
        if data is None:
            raise ConfigError(
                f"{path} has more than {_LARGEST_BYTES} bytes: choose a config of a sensible size"
            )
        node = yaml.compose(data.decode(), yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}, {error.strerror}: correct the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no YAML, {reason}: correct it there") from error
    if node is not None:
        _check_size(path, node)


def _check_size(path: pathlib.Path, top: yaml.Node) -> None:
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ConfigError(f"{path} has an alias inside what it stands for: write it out")
        if id(node) not in sizes:
            inside = above | {id(node)}
            sizes[id(node)] = 1 + sum(size(child, inside) for child in _children(node))
        return sizes[id(node)]

    number = size(top, frozenset())
    if number > _MOST_NODES:
        raise ConfigError(
            f"{path} has {number:.3g} values with its aliases written out, and at most {_MOST_NODES} "
            f"are read: use fewer aliases"
        )


def _children(node: yaml.Node) -> list[yaml.Node]:
    match node:
        case yaml.MappingNode():
            return [child for pair in node.value for child in pair]
        case yaml.SequenceNode():
            return node.value
        case _:
            return []
