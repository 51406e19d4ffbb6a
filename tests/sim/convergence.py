"""The healing phase: what has to come true once nothing fails any more, and by when.

    L1, L2, L4   the job trains, commits and flushes
    L3           what can be repaired is repaired
    L5, I7       what is not needed any more is gone

The run ends as soon as all of it is true, in most runs; a patient one goes on to the deadline, and
sees whether anything comes undone. At the deadline, and only then, what is still wrong is judged.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from replication.records import ShardKey, Version

if TYPE_CHECKING:
    from tests.sim.world import World

LOOK_S = 2.0
SLACK_S = 25.0  # what is younger than that at the deadline may still be on its way

Problems = list[tuple[str, str]]  # promise, what is wrong


class Convergence:
    """Runs a healed world to its end, and judges it."""

    def __init__(self, world: "World") -> None:
        self.world = world

    def run(self) -> None:
        """Training pauses first, if it does: repairs must not depend on new saves."""
        world, setup, kernel = self.world, self.world.setup, self.world.kernel
        settle_s = setup.idle_s / 2
        if world.is_paused:
            self._until(
                kernel.now_s + setup.idle_s,
                lambda slack_s: [*self._redundancy(slack_s), *self._abandoned()],
            )
            world.is_paused, settle_s = False, 0.0
        resumed_s = kernel.now_s
        since_s = resumed_s + settle_s

        def problems(slack_s: float) -> Problems:
            found = self._progress(since_s if slack_s else resumed_s, slack_s)
            return [*found, *self._redundancy(slack_s), *self._garbage()]

        self._until(since_s + setup.calm_s, problems)

    def _until(self, deadline_s: float, problems: Callable[[float], Problems]) -> None:
        world, kernel = self.world, self.world.kernel
        while kernel.now_s < deadline_s:
            kernel.run(min(deadline_s, kernel.now_s + LOOK_S))
            if not world.setup.is_patient and self._has_begun() and not problems(0.0):
                return
        for name, text in problems(SLACK_S):
            world.oracle.violated(name, text)

    def _has_begun(self) -> bool:
        """Whether the job runs, in its newest generation."""
        life, generation = self.world.launcher.life, self.world.oracle.generation
        return life is not None and all(r.generation == generation for r in life.ranks)

    def _progress(self, since_s: float, slack_s: float) -> Problems:
        oracle, settings = self.world.oracle, self.world.setup.settings
        now_s = self.world.kernel.now_s
        fresh = [v for v, at_s in oracle.acked.items() if at_s > since_s]
        if len(fresh) < settings.memory.keep + 2:
            return [("L1", f"only {len(fresh)} commits since all is well")]
        due = [v for v in fresh if settings.is_due_for_s3(v.step)]
        if not due and settings.s3 is not None and not slack_s:
            return [("L4", "nothing was due for S3 yet")]
        late = [v for v in due if now_s - oracle.acked[v] >= slack_s]
        if late and max(oracle.durable, default=Version(0, 0)) < max(late):
            return [("L4", f"{max(late)} is still not on S3")]
        return []

    def _redundancy(self, slack_s: float) -> Problems:
        world, oracle, now_s = self.world, self.world.oracle, self.world.kernel.now_s
        parent = oracle.parents.get(oracle.generation)
        needed = [v for v in oracle.newest_acked() if now_s - oracle.acked[v] >= slack_s]
        needed = [v for v in needed if all(oracle.has_copy(v, r) for r in oracle.ranks_of(v))]
        need = 1 + min(world.replicas(), len(world.staying()) - 1)
        newest = max([*needed[:1], *([parent] if parent is not None else [])], default=None)
        if newest is None or newest < oracle.mark:  # holders may not take back what they collected
            return []
        problems = []
        for rank in oracle.ranks_of(newest):
            have = self._held_copies(newest, rank)
            if oracle.has_copy(newest, rank) and len(have) < need:
                problems.append(("L3", f"rank {rank} of {newest} has only {have}, not {need}"))
        return problems

    def _held_copies(self, version: Version, rank: int) -> list[str]:
        """Hosts with a copy that is what was saved, but for those that will go away."""
        staying = {host.place for host in self.world.staying()}
        key = ShardKey(self.world.job_name, version, rank)
        content = dict(enumerate(self.world.oracle.saved.get(key, ())))
        return sorted(
            holder.id.node_id
            for holder in self.world.holders.values()
            if holder.id.node_id in staying
            and holder.is_alive
            and holder.chunks.get(key) == content
        )

    def _abandoned(self) -> Problems:
        """Half steps of dead generations are gone before anything new is committed."""
        oracle = self.world.oracle
        return [
            ("L5", f"{holder.id} still holds {key}")
            for holder in self.world.holders.values()
            for key in (holder.chunks if holder.is_alive else ())
            if key.version.generation < oracle.generation
            and not oracle.is_on_branch(key.version)
            and len(oracle.copies.get(key.version, ())) < len(oracle.ranks_of(key.version))
            and oracle.generation == self.world.claimed_generation()
        ]

    def _garbage(self) -> Problems:
        oracle, settings = self.world.oracle, self.world.setup.settings
        acked = [v for v in oracle.acked if v.generation == oracle.generation]
        if len(acked) < settings.memory.keep + 2:
            return []  # L1 says so
        memory = settings.memory
        most = memory.steps_held + 1 + 2 * (settings.s3 is not None)  # one that is being collected
        problems = []
        for holder in self.world.holders.values():
            held = sorted({key.version for key in holder.chunks}) if holder.is_alive else []
            if len(held) > most:
                problems.append(("I7", f"{holder.id} still holds {[str(v) for v in held]}"))
            if held and held[0].generation < oracle.generation and not memory.also_keep:
                problems.append(("L5", f"{holder.id} still holds {held[0]}"))
        return problems
