"""Cluster files for tests: written, and with one value changed."""

import copy
import pathlib
from collections.abc import Sequence

import yaml


def write_cluster(folder: pathlib.Path, tree: object) -> pathlib.Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def changed_at(tree: dict, path: Sequence[str | int], value: object) -> dict:
    """A copy with the value at a path replaced, or without it if the value is `...`."""
    found = copy.deepcopy(tree)
    *parents, last = path
    node = found
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return found
