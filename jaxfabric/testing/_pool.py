"""The clusters that are kept between tests."""

from __future__ import annotations

import collections
from collections.abc import Callable

from jaxfabric.testing._cluster import Cluster

# Each is some hundred MB of Python and XLA per rank.
MAX_CLUSTERS = 2

Shape = tuple[int, int]


class Pool:
    """At most `MAX_CLUSTERS` clusters; the one used least recently goes first."""

    def __init__(self) -> None:
        self._clusters: collections.OrderedDict[Shape, Cluster] = (
            collections.OrderedDict()
        )

    def get(self, shape: Shape, start: Callable[[], Cluster]) -> Cluster:
        """The cluster of this shape, started if there is none.

        Raises:
          ClusterError: it did not start.
        """
        if shape not in self._clusters:
            while len(self._clusters) >= MAX_CLUSTERS:
                self._clusters.popitem(last=False)[1].close()
            self._clusters[shape] = start()
        self._clusters.move_to_end(shape)
        return self._clusters[shape]

    def discard(self, shape: Shape) -> None:
        """Kills the cluster of this shape, if there is one."""
        cluster = self._clusters.pop(shape, None)
        if cluster is not None:
            cluster.kill()

    def close(self) -> None:
        """Ends all clusters, with the teardown of their fixtures."""
        while self._clusters:
            self._clusters.popitem()[1].close()
