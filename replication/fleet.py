"""Holders as Ray actors: one detached, named actor a host.

`max_restarts=0`: a restarted holder would have lost its data under the same name, so its death must
be visible; whoever keeps the fleet (the coordinator) starts another one. `num_cpus=0`: it takes no
slot from training.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, assert_never

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replication import membership
from replication.dataplane import Access, Reach
from replication.detour import Pair
from replication.errors import ReleaseError
from replication.holder import NAMESPACE, Holder, HolderInfo, holder_name
from replication.membership import Membership, Node
from replication.records import ActorRef, HolderId
from replication.release import RELEASE, release_of
from replication.wire import Secret

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 2.0
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


def draining_nodes() -> frozenset[str]:
    """The hosts that Ray was told will go away: `ray drain-node`, an autoscaler, a preemption.

    Ray has no public call for it that works without its dashboard; a release that lacks this one
    (Ray 2.60 has it) tells nothing.
    """
    state = ray._private.state.state
    ask: Callable[[], Mapping[str, int]] = getattr(state, "get_draining_nodes", dict)
    return frozenset(ask())


def start_holder(node: Node, observer: str, secret: Secret) -> ActorRef:
    """Start the holder of a host, or return the one that is there; does not wait for it.

    Args:
        node: The host.
        observer: Name of the actor that holders report to.
        secret: Of the cluster's data plane.
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
    return actor.remote(node.node_id, node.capacity_bytes, observer, secret)


class Fleet:
    """Keeps one holder on every host and knows which of them live; a shell of `Membership`.

    Lives on its owner's event loop. The owner calls `beat` about every `HEARTBEAT_S`.
    """

    def __init__(
        self,
        observer: str,
        joined: Callable[[HolderId, str], Coroutine[Any, Any, None]],
        lost: Callable[[HolderId], None],
        may_end: Callable[[str], bool],
        leaving: Callable[[str], None],
        cut: Callable[[frozenset[Pair]], None],
        secret: Callable[[], Secret],
    ) -> None:
        """Start with no holders.

        Args:
            observer: Name of the actor that holders report to.
            joined: Called with a holder that has come (back) and its failure domain.
            lost: Called with a holder that is gone or silent.
            may_end: Asked before the hung holder of a host is ended, and its copies with it.
            leaving: Called with each host that Ray says will go away, once.
            cut: Called with the pairs of hosts that cannot reach each other, when those change.
            secret: Returns the secret of the cluster's data plane, always the same; may block.
        """
        self.members = Membership()
        self._observer = observer
        self._joined = joined
        self._lost = lost
        self._may_end = may_end
        self._leaving = leaving
        self._cut = cut
        self._secret = secret
        self._known_secret: Secret | None = None
        self._handles: dict[str, ActorRef] = {}
        self._also: set[str] = set()
        self._draining: frozenset[str] = frozenset()
        self.infos: dict[str, HolderInfo] = {}  # by host: what its holder said last
        self.refused: dict[str, str] = {}  # hosts whose holder is of another release: of which

    def check_release(self, node_id: str) -> None:
        """See that the holder of a host, if it has answered, is of this release.

        Raises:
            ReleaseError: It is of another.
        """
        if (release := self.refused.get(node_id)) is not None:
            raise ReleaseError(f"the holder on host {node_id[:8]}", release, RELEASE)

    def require(self, node_id: str) -> None:
        """Have a holder on this host even if it has neither CPUs nor GPUs."""
        self._also.add(node_id)

    async def beat(self) -> None:
        """Look for hosts that came or went, start missing holders, send each a heartbeat."""
        nodes = await asyncio.to_thread(cluster_nodes, frozenset(self._also))
        await self._handle(membership.NodesSeen(nodes))
        draining = await asyncio.to_thread(draining_nodes)
        for node_id in sorted(draining - self._draining):
            logger.warning("host %s is about to go away, says Ray", node_id[:8])
            self._leaving(node_id)
        self._draining = draining
        await asyncio.gather(*(self._ping(node_id) for node_id in self.members.started))

    async def call(self, holder: HolderId, method: str, timeout_s: float, *args: Any) -> Any:
        """Call a holder's method; whatever goes wrong is raised within `timeout_s`."""
        handle = self._handles.get(holder.node_id)
        if handle is None:
            handle = await asyncio.to_thread(ray.get_actor, holder_name(holder.node_id), NAMESPACE)
        return await asyncio.wait_for(getattr(handle, method).remote(*args), timeout_s)

    def reach(self, holders: Collection[HolderId]) -> dict[HolderId, Reach]:
        """How to get at these holders, as far as they have been heard of."""
        found = {}
        for holder in holders:
            info, handle = self.infos.get(holder.node_id), self._handles.get(holder.node_id)
            if info is not None and info.holder == holder and handle is not None:
                assert self._known_secret is not None, "it was started with it"
                found[holder] = Reach(handle, Access(info.endpoint, self._known_secret))
        return found

    async def _ping(self, node_id: str) -> None:
        handle = self._handles.get(node_id)
        if handle is None:
            return
        event: membership.Event
        try:
            info: HolderInfo = await asyncio.wait_for(handle.hello.remote(), HEARTBEAT_TIMEOUT_S)
            if (release := release_of(info)) != RELEASE:
                self._refuse(node_id, release)
                return
            self.refused.pop(node_id, None)
            self.infos[node_id] = info
            event = membership.Answered(info.holder, info.cut_off)
        except Exception as error:  # noqa: BLE001 - whatever it is, the holder did not answer
            is_dead = isinstance(error, ActorDiedError | ActorUnschedulableError)
            event = membership.Missed(node_id, is_dead)
        await self._handle(event)

    def _refuse(self, node_id: str, release: str) -> None:
        """Leave a holder of another release alone: it keeps what it has, and nothing here counts.

        It is neither used nor replaced, for what it has in memory would be lost.
        """
        if self.refused.get(node_id) != release:
            self.refused[node_id] = release
            where = f"the holder on host {node_id[:8]}"
            logger.error("%s", ReleaseError(where, release, RELEASE))

    async def _handle(self, event: membership.Event) -> None:
        starting = []
        for command in self.members.handle(event):
            match command:
                case membership.StartHolder():
                    starting.append(self._start(command.node))
                case membership.ReplaceHolder():
                    self._end(command.node_id)
                case membership.LinksChanged():
                    self._cut(command.cut)
                case membership.HolderJoined():
                    logger.info("holder %s is up", command.holder)
                    await self._joined(command.holder, command.domain)
                case membership.HolderLost():
                    logger.warning("holder %s is lost", command.holder)
                    self._lost(command.holder)
                case _:
                    assert_never(command)
        await asyncio.gather(*starting)

    def _end(self, node_id: str) -> None:
        """End a holder that hangs on a host that lives; its copies are elsewhere by now."""
        handle = self._handles.get(node_id)
        if handle is None or not self._may_end(node_id):
            return
        logger.warning("holder on host %s hangs: replacing it", node_id[:8])
        ray.kill(handle, no_restart=True)

    async def _start(self, node: Node) -> None:
        """Start a host's holder, or find it; heartbeats tell when it is up."""
        try:
            secret = self._known_secret = await asyncio.to_thread(self._secret)
            handle = await asyncio.to_thread(start_holder, node, self._observer, secret)
        except Exception as error:  # noqa: BLE001 - the host may be gone; try when next seen
            logger.warning("cannot start a holder on host %s: %s", node.node_id[:8], error)
            await self._handle(membership.Missed(node.node_id, is_dead=True))
        else:
            self._handles[node.node_id] = handle
