"""A Ray cluster of two machines on this one, in a process of its own: `python ray_cluster.py FOLDER`.

Prints the address, then takes lines from its input: "lose" ends the second machine as a power failure
would, "behead" the first one, with what keeps the cluster. It ends with its input, and leaves nothing behind.
"""

import contextlib
import os
import shutil
import signal
import sys

from ray.cluster_utils import Cluster

from launcher.runtime.hosts.ray_keeper import kill_descendants


def main(folder: str) -> None:
    settings = {"num_cpus": 1, "object_store_memory": 10**8}
    head = {"temp_dir": folder, "include_dashboard": False} | settings
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(**settings)
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            if line.strip() == "lose":
                second.kill_raylet()
            if line.strip() == "behead":
                cluster.head_node.kill_gcs_server()
                cluster.head_node.kill_raylet()
    kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
