"""Run one config in its folder: with a log file there, and over all nodes of a job step, if it is in one."""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator

from launcher import logs, run_lock
from launcher.cli.run_folder import LOG_FILE, storage_errors
from launcher.config import Config
from launcher.errors import LauncherError
from launcher.slurm import ray_nodes
from launcher.slurm.step import step_here

log = logging.getLogger(__name__)


def run_logged(
    make_config: Callable[[], Config],
    run_dir: pathlib.Path,
    left_by: run_lock.Holder | None,
    meeting: pathlib.Path | None,
) -> int:
    """Run, and return the exit status.

    Args:
        make_config: called when the log file is open, so that what is wrong about it stands there too.
        left_by: who has died in the folder, if somebody has.
        meeting: where the processes of a job step meet; None: this one is alone.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors():
            stack.enter_context(logs.logging_to(run_dir / LOG_FILE))
        if left_by is not None:
            log.warning("this folder was left by %s, which died here", left_by)
        try:
            config = stack.enter_context(_over_nodes(make_config(), meeting))
            # Not at the top: it brings JAX, which help and config errors do not wait for.
            from launcher.main import run

            return run(config, run_dir)
        except LauncherError as error:
            log.error("%s", error)
            raise
        except Exception:  # to the log file too, then on
            log.exception("a bug of ours")
            raise


@contextlib.contextmanager
def _over_nodes(config: Config, meeting: pathlib.Path | None) -> Iterator[Config]:
    """Within the context Ray runs on all nodes of the step, and the config says where."""
    step = step_here(os.environ)
    needs_nodes = config.mode == "train" and config.runtime.name in ("auto", "ray")
    if meeting is None or step is None or step.num_nodes == 1 or not needs_nodes:
        yield config
        return
    log.info("joining %d nodes of Slurm job %s", step.num_nodes, step.job_id)
    num_hosts = config.cluster.hosts or step.num_nodes
    with ray_nodes.head(step, meeting, math.ceil(num_hosts / step.num_nodes)) as address:
        log.info("%d nodes have joined (Ray at %s)", step.num_nodes, address)
        runtime = dataclasses.replace(config.runtime, name="ray", address=address)
        yield dataclasses.replace(config, runtime=runtime)
