"""Compiled programs outlive the process: jax's persistent compilation cache, on by default.

On GPUs the key of a program leaves its devices out (jax's own rule), so stages that are alike compile once
even within a run. Where they are kept by default is `cache_folder.py`.
"""

import os
import pathlib

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from launcher.errors import ConfigError
from launcher.runtime.compiled.cache_folder import default_folder

_LEAST_S = 0.1  # what compiles faster is not worth a file


def use_cache(setting: str) -> pathlib.Path | None:
    """Turn the cache on; returns its folder.

    Args:
        setting: "auto", "off", or a folder. A folder that jax was given by the environment
            (`JAX_COMPILATION_CACHE_DIR`) stays where the setting is "auto".

    Raises:
        ConfigError: the folder that was given cannot be written.
    """
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    given = jax.config.jax_compilation_cache_dir
    if setting != "auto":
        folder = pathlib.Path(setting).expanduser()
        _check_writable(folder, setting)
    elif given:
        folder = pathlib.Path(given)
    else:
        folder = default_folder(os.environ)
    reset_cache()  # or jax keeps to what it found at its first compilation
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)
    return folder


def _check_writable(folder: pathlib.Path, setting: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if not setting or not is_writable:
        raise ConfigError(
            f"{str(folder)!r} is no folder that can be written "
            f"(runtime.compilation_cache={setting}): give another, auto, or off"
        )
