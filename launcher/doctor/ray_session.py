"""Ray: can a session be started here, or the cluster of RAY_ADDRESS be reached?"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, failed, ok
from launcher.doctor.wording import counted
from launcher.runtime.hosts.ray_pool import QUIETLY, own_token, ray_address

LIMIT_S = 60.0
CONNECT_LIMIT_S = 3.0
PROBE = (sys.executable, "-m", "launcher.doctor.probe_ray")


def check_ray(
    run: Runner,
    environment: Mapping[str, str],
    connect: Callable[[str, int, float], str | None],
) -> Iterator[Finding]:
    """Run one task on Ray; a session that is started for it ends with the check.

    Args:
        connect: opens a connection to a host and port within some seconds; returns what is in the
            way, or None. Ray itself tries for minutes.
    """
    address = ray_address("auto", environment) or ""
    server = urlsplit(address if "//" in address else f"//{address}")
    if server.hostname and server.port:
        obstacle = connect(server.hostname, server.port, CONNECT_LIMIT_S)
        if obstacle is not None:
            yield _cluster_fails(obstacle, address)
            return
    # Short, because Ray's sockets lie in it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        start = time.perf_counter()
        outcome = run((*PROBE, folder), LIMIT_S, QUIETLY if address else QUIETLY | own_token())
        wall_s = time.perf_counter() - start
    if outcome is None or outcome.status != 0:
        reason = _reason(outcome)
        yield _cluster_fails(reason, address) if address else _session_fails(reason)
        return
    found = json.loads(outcome.stdout.strip().splitlines()[-1])
    if address:
        extent = f"{counted(found['nodes'], 'node')}, {counted(found['gpus'], 'GPU')}"
        yield ok(f"the Ray cluster of RAY_ADDRESS={address} answers: {extent}")
    else:
        yield ok(f"a local Ray session starts, runs a task and ends ({wall_s:.1f} s)")


def _reason(outcome: Outcome | None) -> str:
    if outcome is None or outcome.status is None:
        return f"no answer within {LIMIT_S:.0f} s"
    return outcome.last_words


def _session_fails(reason: str) -> Finding:
    return failed(
        f"no local Ray session: {reason}",
        "runs over several hosts (runtime=ray) will not start; runs in one process do not need Ray",
        "if a module is missing: pip install ray; else see that /tmp and /dev/shm have "
        "space, that no firewall is between ports of 127.0.0.1, and that http_proxy leaves it out "
        "(no_proxy=127.0.0.1,localhost)",
    )


def _cluster_fails(reason: str, address: str) -> Finding:
    return failed(
        f"no Ray cluster at RAY_ADDRESS={address}: {reason}",
        "runs that are to use that cluster will not start",
        "see `ray status` on its head node: it must be up, of the same versions of Ray and Python, "
        "and reachable from here; if it asks for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH; "
        "unset RAY_ADDRESS to start sessions of your own",
    )
