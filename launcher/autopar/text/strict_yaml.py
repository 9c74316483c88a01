"""Reading YAML files of users: plain values only, of a sensible size, with errors in one line.

What the values must be is `strict_reader`'s to say.
"""

from pathlib import Path

import yaml

from launcher.errors import ConfigError
from launcher.regular_file import read_regular

_LARGEST_FILE_BYTES = 2**20


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, and no key twice: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping that `super` builds, which does not compare keys."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(
                None, None, "a key stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, key: str = "cluster") -> object:
    """Return what a cluster file holds; `key` is the one that named it."""
    try:
        data = read_regular(path, _LARGEST_FILE_BYTES)
        if data is None:
            raise ConfigError(
                f"{path} has more than {_LARGEST_FILE_BYTES} bytes ({key}={path}): "
                "give the path of a cluster file"
            )
        return yaml.load(data.decode(), _StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}, {error.strerror} ({key}={path}): correct the path"
        ) from error
    # Beside YAMLError: what PyYAML's constructors let through for values such as `!!int ''`.
    except (
        yaml.YAMLError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError,
        RecursionError,
    ) as error:  # fmt: skip
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no YAML ({key}={path}), {why}: correct it there") from error
