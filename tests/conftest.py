"""What every test stands on: eight emulated CPU devices, strict promotion, no network, fixed draws.

The environment is set before anything imports JAX, which reads it once. Tests that need an
accelerator say so with the marker `gpu`: `JAX_PLATFORMS=cuda,cpu pytest -m gpu -n 0`.
"""

import os
import pathlib
import random
import tempfile
from collections.abc import Callable

NUM_DEVICES = 8
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={NUM_DEVICES}")
).strip()
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
if "LAUNCHER_TESTS_CACHE" not in os.environ:  # workers have that of the process that started them
    os.environ["LAUNCHER_TESTS_CACHE"] = tempfile.mkdtemp(prefix="launcher-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["LAUNCHER_TESTS_CACHE"]
os.environ.pop("HYDRA_FULL_ERROR", None)  # a developer's; it changes what the command line prints

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples everywhere, so that a failure of one machine is a failure of all; no deadline,
# because the first example compiles.
hypothesis.settings.register_profile("launcher", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("launcher")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a caller draw a seeded sample of what its `-m` selects."""
    group = parser.getgroup("launcher")
    group.addoption("--draw", type=int, metavar="N", help="run N of the selected tests, drawn")
    group.addoption("--draw-seed", default="", metavar="TEXT", help="seed of --draw")
    group.addoption("--update-golden", action="store_true", help="write tests/golden/ anew")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the drawn tests; after `-m`, and the same in every worker process."""
    count = config.getoption("--draw")
    if count is None or count >= len(items):
        return
    drawn = set(random.Random(config.getoption("--draw-seed")).sample(range(len(items)), count))
    config.hook.pytest_deselected(
        items=[item for index, item in enumerate(items) if index not in drawn]
    )
    items[:] = [item for index, item in enumerate(items) if index in drawn]


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the errors that exactness tests noted, as a table of dtype, model and plan."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "largest errors"
    ]
    if not rows:
        return
    terminalreporter.section("largest errors against one device")
    columns = ("gradients", "loss", "parameters", "state")
    terminalreporter.write_line(" " * 46 + "".join(f"{column:>12}" for column in columns))
    for family, plan, dtype, errors in sorted(rows, key=lambda row: (row[2], row[0], row[1])):
        found = [f"{errors[column]:.1e}" if column in errors else "" for column in columns]
        cells = "".join(f"{text:>12}" for text in found)
        terminalreporter.write_line(f"{dtype}  {family:<8}{plan:<32}{cells}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a file of tests/golden/; with --update-golden write the file instead."""

    def compare(name: str, text: str) -> None:
        path = pathlib.Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text()

    return compare


@pytest.fixture(scope="module")
def no_new_backend():
    """For runs in this process: its devices are there already, and their number cannot change any more."""
    from launcher.runtime import devices

    found = devices.Found(kind="cpu", count=0, memory_bytes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "emulate", lambda num_devices: None)
        patch.setattr(devices, "discover", lambda num_cpu_devices: found)
        yield
