"""Weights & Biases: the mode a run would log in, and whether the server can be reached.

A login is looked for and never shown. W&B is not imported: that a run goes on when it breaks is the
sink's promise, so nothing here is a failure.
"""

from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from launcher.doctor.findings import Finding, absent, ok, warning

LIMIT_S = 3.0
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
DEFAULT_SERVER = "https://api.wandb.ai"


def check_wandb(
    version: str | None,
    environment: Mapping[str, str],
    is_logged_in: bool,
    reach: Callable[[str, float], str | None],
) -> Iterator[Finding]:
    """Say whether runs would be logged online, and why not.

    Args:
        version: of the package; None: it is not installed.
        reach: asks a server for an answer within some seconds; returns what is in the way, or None.
    """
    if version is None:
        yield warning(
            "wandb is not installed",
            "runs go on without W&B; metrics.jsonl has every row",
            "pip install wandb, or logger=jsonl for no W&B",
        )
        return
    mode = environment.get("WANDB_MODE")
    if mode and mode not in MODES:
        yield warning(
            f"WANDB_MODE={mode} is none of {', '.join(MODES)}",
            "W&B refuses to start, and runs are logged to metrics.jsonl alone",
            "unset WANDB_MODE, or give one of these",
        )
        return
    goes_online = is_logged_in if not mode else mode in ("online", "shared", "run")
    yield from _login(version, mode, is_logged_in, goes_online)
    yield _server(environment.get("WANDB_BASE_URL") or DEFAULT_SERVER, goes_online, reach)


def _login(
    version: str, mode: str | None, is_logged_in: bool, goes_online: bool
) -> Iterator[Finding]:
    login = "logged in" if is_logged_in else "not logged in"
    chosen = f"WANDB_MODE={mode}" if mode else "no WANDB_MODE"
    if goes_online and not is_logged_in:
        yield warning(
            f"wandb {version}: {chosen}, {login}",
            "W&B will ask for a key, or refuse to start where nobody can answer",
            "wandb login, or WANDB_MODE=offline",
        )
        return
    logs = "online" if goes_online else "offline (`wandb sync` uploads them later)"
    if mode == "disabled":
        logs = "nowhere"
    yield ok(f"wandb {version}: {chosen}, {login}: runs are logged {logs}")


def _server(server: str, goes_online: bool, reach: Callable[[str, float], str | None]) -> Finding:
    obstacle = reach(server, LIMIT_S)
    host = urlsplit(server).hostname or "WANDB_BASE_URL"  # a URL may hold a password
    if obstacle is None:
        return ok(f"{host} answers")
    if not goes_online:
        return absent(f"{host} cannot be reached ({obstacle}); runs are logged offline anyway")
    return warning(
        f"{host} cannot be reached within {LIMIT_S:.0f} s: {obstacle}",
        "a run tries to log in for half a minute, and is then logged offline",
        "WANDB_MODE=offline saves the half minute; behind a proxy set HTTPS_PROXY; a server of your "
        "own is WANDB_BASE_URL",
    )
