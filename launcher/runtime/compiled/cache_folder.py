"""Where compiled programs are kept unless a run is told otherwise; needs no JAX.

On CPUs programs are compiled for the features of the machine at hand; each kind of machine has a folder
of its own, since a home folder may be shared.
"""

import hashlib
import pathlib
import platform
from collections.abc import Mapping

GIVEN = "JAX_COMPILATION_CACHE_DIR"  # jax's own variable, which it reads itself


def cache_folder(environment: Mapping[str, str]) -> pathlib.Path:
    """Return the folder of `runtime.compilation_cache=auto`."""
    if environment.get(GIVEN):
        return pathlib.Path(environment[GIVEN])
    return default_folder(environment)


def default_folder(environment: Mapping[str, str]) -> pathlib.Path:
    """Return the folder where jax was given none."""
    caches = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "launcher" / "xla" / _machine()


def _machine() -> str:
    """Equal for machines whose CPUs have the same features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    )
    digest = hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
