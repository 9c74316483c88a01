"""What JAX can compute on: the real devices, and emulated ones; each of them computes something."""

import json
import sys
from collections.abc import Iterator, Mapping

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, failed, ok, warning
from launcher.doctor.gpus import find_gpus, visible
from launcher.doctor.wording import counted, size

LIMIT_S = 60.0
NUM_EMULATED = 8
PROBE = (sys.executable, "-m", "launcher.doctor.probe_devices")
# JAX would otherwise take most of a GPU's memory, beside a run that is using it.
# And its note on shortened tracebacks would stand where the reason is looked for.
QUIETLY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}

Found = Mapping[str, object]


def check_devices(run: Runner, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Let every device of JAX compute, all of them add up, and compare with the driver's GPUs."""
    outcome = run(PROBE, LIMIT_S, QUIETLY)
    found = read_probe(outcome)
    if found is None:
        yield _no_devices(outcome, environment.get("JAX_PLATFORMS"))
        return
    yield _computed(found, _described(found))
    yield from _missing_gpus(found, len(find_gpus(run)), environment, outcome)


def check_emulated(run: Runner) -> Iterator[Finding]:
    """See that a CPU can stand for several devices, as rehearsals need it."""
    outcome = run((*PROBE, str(NUM_EMULATED)), LIMIT_S, QUIETLY)
    found = read_probe(outcome)
    if found is None or found["count"] != NUM_EMULATED:
        count = "none" if found is None else found["count"]
        yield failed(
            f"{NUM_EMULATED} emulated CPU devices: {count} came up ({_reason(outcome)})",
            "runtime=emulate, and cluster=local without a GPU, will not run",
            "see whether JAX_NUM_CPU_DEVICES or XLA_FLAGS is set, and unset it; if the process was "
            "killed, it lacked memory",
        )
        return
    yield _computed(found, f"{NUM_EMULATED} emulated CPU devices")


def read_probe(outcome: Outcome | None) -> Found | None:
    """Read the last line of the probe's output; None if the probe did not get there."""
    if outcome is None or outcome.status != 0 or not outcome.stdout.strip():
        return None
    return json.loads(outcome.stdout.strip().splitlines()[-1])


def _described(found: Found) -> str:
    memory = found["memory_bytes"]
    each = f", {size(memory)} each for JAX" if memory else ""
    return f"JAX has {found['count']} x {found['kind']} ({found['platform']}{each})"


def _computed(found: Found, name: str) -> Finding:
    wrong, count = found["wrong"], found["count"]
    expected = count * (count + 1) // 2
    if wrong:
        return failed(
            f"{name}: wrong products of matrices on {', '.join(wrong)}",
            "these devices compute wrong numbers: no result of theirs can be trusted",
            "take the host out of use and have the hardware tested",
        )
    if found["sum"] != expected:
        return failed(
            f"{name}: their sum over devices is {found['sum']}, and {expected} is right",
            "communication between the devices loses or changes data",
            "try NCCL_P2P_DISABLE=1; if that helps, peer-to-peer access is broken on this host",
        )
    return ok(f"{name}; each computes, and they add up ({found['compute_s']:.1f} s)")


def _no_devices(outcome: Outcome | None, platforms: str | None) -> Finding:
    if outcome is not None and outcome.status is None:
        return failed(
            f"JAX did not compute anything within {LIMIT_S:.0f} s",
            "a driver, or the communication between GPUs, hangs; runs here hang too",
            "look for Xid lines in `dmesg`; JAX_PLATFORMS=cpu tells whether it is the driver, "
            "NCCL_P2P_DISABLE=1 whether it is the links between GPUs",
        )
    setting = f" (JAX_PLATFORMS={platforms} is set)" if platforms else ""
    return failed(
        f"JAX does not start: {_reason(outcome)}{setting}",
        "nothing that computes can run here; mode=plan needs JAX too",
        'if a package is missing or too old: pip install --upgrade "jax-launcher"; if it is the GPU: '
        "JAX_PLATFORMS=cpu leaves it out; if its memory is full: `nvidia-smi` says whose work is there",
    )


def _reason(outcome: Outcome | None) -> str:
    if outcome is None:
        return f"{sys.executable} cannot be started"
    return "no answer" if outcome.status is None else outcome.last_words


def _missing_gpus(
    found: Found, num_gpus: int, environment: Mapping[str, str], outcome: Outcome
) -> Iterator[Finding]:
    num_seen = 0 if found["platform"] == "cpu" else found["count"]
    if num_seen >= num_gpus:
        return
    limited = visible(environment)
    if limited is not None:
        yield warning(
            f"the machine has {counted(num_gpus, 'GPU')} and JAX uses {num_seen}: {limited} is set",
            "runs leave the other GPUs idle",
            f"unset {limited.partition('=')[0]} if that is not what you want",
        )
    elif num_seen == 0:
        yield failed(
            f"the machine has {counted(num_gpus, 'GPU')}, and JAX computes on the CPU ({_why_cpu(outcome)})",
            "JAX's part for CUDA is not installed, or does not start; runs would be slow",
            'pip install "jax-launcher[cuda]"',
        )
    else:
        yield warning(
            f"the machine has {counted(num_gpus, 'GPU')}, and JAX uses {num_seen}",
            "some GPUs do not start, or this job was not given them",
            "compare with `nvidia-smi -L`, and with what the job asked for",
        )


def _why_cpu(outcome: Outcome) -> str:
    """What JAX itself says on stderr about the GPUs that it does not use."""
    said = [line for line in outcome.stderr.splitlines() if "cuda" in line.lower()]
    return said[-1].strip() if said else "it gives no reason"
