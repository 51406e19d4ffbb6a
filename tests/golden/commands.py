"""The commands of the cores in words, one line each; an answer tells what was answered."""

from collections.abc import Iterator
from typing import assert_never

from replication import membership, messages
from tests.golden.notation import write_holder, write_holders, write_shard, write_versions
from tests.golden.notation import write_version as v
from tiered import messages as m
from tiered.history import ShardSources
from tiered.job import Job


def of_job(job: Job, command: m.Command) -> Iterator[str]:
    match command:
        case m.SeekOwner(life, owner, holder):
            yield f"seek process {owner.pid} on {write_holder(holder)} for {life}"
        case m.ClaimGeneration(claim):
            yield f"claim g{claim.generation} for {claim.life}"
        case m.ListDurable():
            yield "list S3"
        case m.FenceHolders(generation, holders):
            yield f"fence below g{generation} on {write_holders(holders)}, and wait"
        case m.FenceNewHolder(generation, holder):
            yield f"fence below g{generation} on {write_holder(holder)}"
        case m.VerifyShards(_, version, copies, needs_manifest):
            read = [f"{write_holder(h)} r{key.rank}" for h, keys in copies for key in keys]
            read += ["its manifest"] * needs_manifest
            yield f"verify {v(version)}: {', '.join(read)}"
        case m.RecordParent(generation, parent):
            yield f"record g{generation} <- {v(parent)}"
        case m.AnswerBegin():
            yield from _answer(job, command)
        case m.SetBuddies(holder, buddies, _):
            yield f"buddies of {write_holder(holder)}: {write_holders(buddies)}"
        case m.CollectBelow(generation, below, holders, pinned, branch):
            beyond = f" and beyond {write_versions(branch)}" if branch else ""
            if branch == () and generation > 1:
                beyond = " and of older generations"
            but = f", but not {write_versions(pinned)}" if pinned else ""
            yield f"collect below {v(below)}{beyond} on {write_holders(holders)}{but}"
        case m.ReleaseCopies(_, holder, keys):
            yield f"release {' '.join(map(write_shard, keys))} on {write_holder(holder)}"
        case m.ReplicateShard(source, key, to):
            yield f"copy {write_shard(key)} from {write_holder(source)} to {write_holder(to)}"
        case m.StepCommitted(version, _, copies, is_degraded):
            of = "1 copy" if copies == 1 else f"{copies} copies"
            yield f"committed {v(version)}, {of} of each shard" + ", degraded" * is_degraded
        case m.UploadShard(holder, version, rank):
            yield f"upload {v(version)}/r{rank} from {write_holder(holder)}"
        case m.PublishManifest(version):
            yield f"publish {v(version)}"
        case m.AskDurable():
            yield "ask S3 whether it answers"
        case m.FlushGivenUp(version, reason):
            yield f"flush given up {v(version)}: {reason}"
        case m.DeleteDurable(versions):
            yield f"delete from S3 {write_versions(versions)}"
        case m.CollectOrphans():
            yield "collect orphans on S3"
        case m.ReadManifests(versions):
            yield f"read manifests of {write_versions(versions)}"
        case m.AnswerSave(version, answer):
            instead = "".join(f", instead of step {s}" for s in answer.instead_of)
            verdict = "yes" + instead if answer.is_admitted else f"no, {answer.reason}"
            yield f"save {v(version)}: {verdict}"
        case m.DropStep(version, holders):
            yield f"drop {v(version)} on {write_holders(holders)}"
        case m.PolicyMissed(version, ranks):
            yield f"too few copies {v(version)}, ranks {' '.join(map(str, ranks))}"
        case m.PolicyMet(version, after_s):
            yield f"enough copies again {v(version)}, after {after_s:.1f}s"
        case _:
            assert_never(command)


def _answer(job: Job, command: m.AnswerBegin) -> Iterator[str]:
    if command.error is not None:
        yield f"answer {command.life}: {type(command.error).__name__}: {command.error}"
        return
    generation = max(
        (c.generation for c in job.claims.values() if c.life == command.life), default=0
    )
    if generation not in job.parents:
        yield f"answer {command.life}: nobody trains"
        return
    resolution = job.resolution(generation)
    yield f"answer {command.life}: g{generation} resumes from {v(resolution.version)}"
    for shard in resolution.shards:
        yield f"  r{shard.record.key.rank} from {sources(shard)}"
    for line in resolution.passed_over:
        yield f"  passed over: {line}"


def sources(shard: ShardSources) -> str:
    """Where a shard can be read."""
    places = [*map(write_holder, shard.holders), *["S3"] * shard.is_durable]
    return " or ".join(places) or "nowhere"


def of_holder(command: messages.Command) -> Iterator[str]:
    match command:
        case messages.HashChunk(key, index):
            yield f"hash {write_shard(key)}#{index}"
        case messages.ReadTwin(key, index, _, twin):
            yield f"read {write_shard(twin)}#{index} again, which equals {write_shard(key)}#{index}"
        case messages.ShareChunk(key, index, twin):
            yield f"share {write_shard(twin)}#{index} with {write_shard(key)}"
        case messages.OfferChunk(to, key, _, index):
            yield f"offer {write_shard(key)}#{index} to {write_holder(to)}"
        case messages.ReportShard(record):
            replica = ", a replica" if record.is_replica else ""
            yield f"report {write_shard(record.key)}{replica}"
        case messages.ReportCorrupt(key):
            yield f"report that {write_shard(key)} is corrupt"
        case messages.ReadChunk(key, index):
            yield f"read {write_shard(key)}#{index} again"
        case messages.DropShard(key):
            yield f"drop {write_shard(key)}"
        case _:
            assert_never(command)


def of_membership(command: membership.Command) -> Iterator[str]:
    match command:
        case membership.StartHolder(node):
            yield f"start a holder on {node.node_id}"
        case membership.HolderJoined(holder):
            yield f"joined {write_holder(holder)}"
        case membership.HolderLost(holder):
            yield f"lost {write_holder(holder)}"
        case membership.LinksChanged(cut):
            yield f"links cut: {', '.join(map('-'.join, sorted(cut))) or 'none'}"
        case membership.ReplaceHolder(node_id):
            yield f"replace the holder on {node_id}"
        case _:
            assert_never(command)
