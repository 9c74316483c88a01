"""Start a Ray session of one's own, or reach a running one: `python -m launcher.doctor.probe_ray`.

Without RAY_ADDRESS a local session is started in the folder that is given, runs one task, and ends.
With it, the cluster at that address is asked for its nodes, and nothing is left there. The doctor runs
this in a process of its own and reads the last line of its output: one JSON object.
"""

import json
import os
import sys
from collections.abc import Sequence

from launcher.runtime.hosts.ray_pool import ray_address


def main(arguments: Sequence[str]) -> int:
    """Print what was found; whatever goes wrong ends in a traceback, which the doctor reads."""
    import ray

    (folder,) = arguments
    address = ray_address("auto", os.environ)
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(
            address="local",  # never one that happens to run on this machine
            num_cpus=1,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            _temp_dir=folder,
        )
    try:
        found = {
            "answer": ray.get(ray.remote(num_cpus=0 if address else 1)(_answer).remote()),
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "gpus": int(ray.cluster_resources().get("GPU", 0)),
        }
    finally:
        ray.shutdown()
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


def _answer() -> int:
    return 42


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
