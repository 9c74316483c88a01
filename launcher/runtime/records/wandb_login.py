"""Whether W&B is logged in, without W&B's own look-up, which may prompt or go online."""

import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

# Where W&B keeps its login when it is not in the environment; a server of one's own is
# WANDB_BASE_URL.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


def is_logged_in(environment: Mapping[str, str]) -> bool:
    """Say whether a key is at hand."""
    if environment.get("WANDB_API_KEY"):
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL", "")).hostname
    hosts = (server,) if server else WANDB_HOSTS
    try:
        logins = netrc.netrc(environment.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError, RuntimeError):  # RuntimeError: there is no home
        return False
    return any(logins.authenticators(host) for host in hosts)
