"""A Ray cluster of several nodes on this machine: a head without processors, and nodes that may be killed.

`make test-ray` runs these tests; elsewhere they are skipped, because nodes take seconds to start.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
STORE_BYTES = 80 * 2**20
NODE_BYTES = 4 * 2**30


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            if "ray" not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason="starts a Ray cluster; make test-ray runs it"))


class RunningCluster:
    """Nodes with one processor each."""

    def __init__(self, num_nodes):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.nodes = [self.add() for _ in range(num_nodes)]

    def add(self, **changes):
        """Another node."""
        offered = {"num_cpus": 1, "memory": NODE_BYTES, "object_store_memory": STORE_BYTES}
        return self._cluster.add_node(**{**offered, **changes})

    def kill(self, node):
        """End a node as a power cut would."""
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self):
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def cluster():
    running = RunningCluster(num_nodes=3)
    yield running
    running.shutdown()


@pytest.fixture(scope="session")
def executor(cluster):
    """Connected from this process, whose test modules the nodes are sent."""
    import ray

    from moemerge.distributed.cluster import Cluster
    from moemerge.distributed.executor import OnCluster

    with Cluster(cluster.address) as connected:
        for name, module in sys.modules.items():
            if name.startswith("tests.cluster.test_"):
                ray.cloudpickle.register_pickle_by_value(module)
        yield OnCluster(connected)
