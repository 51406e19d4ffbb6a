"""Holders as Ray actors: one detached, named actor a host.

`max_restarts=0`: a restarted holder would have lost its data under the same name, so its death must
be visible; whoever keeps the fleet (the coordinator) starts another one. `num_cpus=0`: it takes no
slot from training.
"""

from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replication.holder import NAMESPACE, Holder, holder_name
from replication.membership import Node
from replication.records import ActorRef

STORE_SHARE = 0.8  # of a host's object store; beyond it Ray starts to spill to disk
DOMAIN_LABELS = ("tiered/domain", "rack", "ray.io/availability-zone")


def cluster_nodes(also: Collection[str] = ()) -> tuple[Node, ...]:
    """The hosts of the cluster that get a holder: those where a trainer can run.

    A node without CPUs and GPUs, as Kubernetes operators set up a head node, is no training host;
    it gets a holder only if it is in `also`, because a trainer turned up on it.
    """
    nodes = []
    for entry in ray.nodes():  # type: ignore[no-untyped-call]
        resources: dict[str, Any] = entry["Resources"]
        can_train = resources.get("CPU", 0) > 0 or resources.get("GPU", 0) > 0
        if not entry["Alive"] or not (can_train or entry["NodeID"] in also):
            continue
        labels = entry.get("Labels") or {}
        domain = next((labels[k] for k in DOMAIN_LABELS if labels.get(k)), "")
        capacity = int(STORE_SHARE * resources.get("object_store_memory", 0))
        nodes.append(Node(entry["NodeID"], domain, capacity))
    return tuple(sorted(nodes, key=lambda node: node.node_id))


def start_holder(node: Node, observer: str) -> ActorRef:
    """Start the holder of a host, or return the one that is there; does not wait for it.

    Args:
        node: The host.
        observer: Name of the actor that holders report to.
    """
    options = {
        "name": holder_name(node.node_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": 0,
        "max_concurrency": 1000,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
    }
    actor: ActorRef = ray.remote(Holder).options(**options)
    return actor.remote(node.node_id, node.capacity_bytes, observer)
