"""Plans as a person writes them: nothing but what they must say."""

from launcher.autopar.plans.plan import ClusterRef, ModelRef, Plan, Stage


def stage_of(
    layers: tuple[int, int], *, mesh: tuple[int, int], host: int = 0, first: int = 0, **rest
):
    """A stage on consecutive devices of one host; `mesh` is (data, tensor)."""
    devices = tuple(range(first, first + mesh[0] * mesh[1]))
    axes = (("data", mesh[0]), ("tensor", mesh[1]))
    return Stage(layers=layers, hosts=(host,), devices=devices, mesh=axes, **rest)


def plan_of(*stages: Stage, **fields) -> Plan:
    """A plan of these stages for the two hosts of `cpu8`."""
    given = {
        "model": ModelRef(name="gpt", size="tiny"),
        "cluster": ClusterRef(name="cpu8", hosts=2, devices_per_host=4),
        "global_batch": 8,
        "num_microbatches": 1,
        "schedule": "1f1b",
    }
    return Plan(stages=stages, **given | fields)
