"""Every failure a user can meet, with the exit status it ends in.

A message has three parts: what is wrong with both numbers, the config key (`parallel.tp=3`), and what
to do. `main` prints it as one line and exits with `exit_status`; anything that is not a `LauncherError`
is a bug of ours and keeps its traceback.
"""


class LauncherError(Exception):
    """The base of all errors that `main` turns into one line and an exit status."""

    exit_status = 1


class ConfigError(LauncherError):
    """The user's input is wrong: a config value, a plan file, a model's interface."""

    exit_status = 2


class PlanError(ConfigError):
    """A plan file that cannot be read, or that does not fit the model or the cluster."""


class UnsupportedPrimitiveError(ConfigError):
    """A model uses a JAX primitive that has no sharding rule."""


class ClusterError(LauncherError):
    """Devices or a service that the run needs are not there."""

    exit_status = 3


class InfeasiblePlanError(LauncherError):
    """No plan fits the model, the cluster and the forced choices."""

    exit_status = 4


class TrainingError(LauncherError):
    """Training failed: a non-finite loss, a lost host, no device memory left."""

    exit_status = 5


class LostPeerError(TrainingError):
    """What a host was to get from another one has failed or not come: no verdict on the run."""


class StorageError(LauncherError):
    """What a run must write or read back cannot be written or read."""

    exit_status = 6


class ScheduleError(LauncherError):
    """A program that would deadlock, leak, or receive what nobody sends: a bug of ours."""


class StoppedBySignal(BaseException):
    """A scheduler's signal asked the run to stop; the text says which, and how far the run came.

    Not an `Exception`, so that nothing on its way takes it for a failure that it can handle.
    """

    exit_status = 75  # EX_TEMPFAIL: run me again


def without_frames(error: LauncherError) -> LauncherError:
    """Return an error to be kept for later: its traceback would keep alive whatever its frames hold."""
    return error.with_traceback(None)
