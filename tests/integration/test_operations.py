"""The command line against a real cluster in which things go wrong; only it is used to find out."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError
from typer.testing import CliRunner

import tiered
from chaos.local_cluster import LocalCluster
from replication.holder import NAMESPACE
from tests.integration.trainers import start_trainers
from tests.waiting import wait_for
from tiered.cli.app import app
from tiered.cluster import coordinator, end_actors

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def tiered_command(*args: str) -> tuple[int, str]:
    """Run a command on the cluster of this process; returns its exit code, and what it printed."""
    done = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


SETTINGS = {"memory": tiered.Memory(every_steps=1, replicas=1)}
STARTED: list[Any] = []  # the trainers


@pytest.fixture(autouse=True)
def no_trainer_outlives_its_test() -> Iterator[None]:
    """One that did would bring its job back into the cluster that the next test finds empty."""
    before = len(STARTED)
    yield
    mine = STARTED[before:]
    del STARTED[before:]
    end(mine)


def end(trainers: list[Any]) -> None:
    """Kill them; returns when their processes are gone."""
    for trainer in trainers:
        with contextlib.suppress(RayActorError):
            pid = ray.get(trainer.pid.remote(), timeout=DEADLINE_S)
            ray.kill(trainer)
            wait_for(lambda pid=pid: not psutil.pid_exists(pid))


def trainers(job: str, hosts: list[str], **more: Any) -> list[Any]:
    started = start_trainers(hosts)
    STARTED.extend(started)
    ray.get([t.start.remote(job, SETTINGS | more, rank) for rank, t in enumerate(started)])
    return started


def trainer_of(run: str, host: str) -> Any:
    """A trainer of another run than all others of this driver."""
    environment = {"env_vars": {"TORCHELASTIC_RUN_ID": run}}
    (trainer,) = start_trainers([host], runtime_env=environment)
    STARTED.append(trainer)
    return trainer


def start(trainer: Any, job: str) -> int:
    """Begin; returns the next step to run."""
    try:
        step: int = ray.get(trainer.start.remote(job, dict(SETTINGS), 0))[0]
    except RayTaskError as error:
        raise error.cause from None
    return step


def save(trainer: Any, step: int) -> None:
    try:
        ray.get(trainer.save.remote(step, step))
    except RayTaskError as error:
        raise error.cause from None


def actors() -> set[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["namespace"] == NAMESPACE}


def test_the_story_of_a_lost_host_is_told_by_the_command_line_alone(
    cluster: LocalCluster, job: str
) -> None:
    hosts = cluster.hosts
    old = trainers(job, hosts[:2])
    ray.get([t.save.remote(1, 10 + rank) for rank, t in enumerate(old)])
    code, text = tiered_command("show", "1", "--job", job)
    assert code == 0
    assert text.count("own") == 2
    assert text.count("replica") == 2
    assert tiered_command("verify", "--job", job) == (
        0, "4 copies in memory and 0 steps on S3 were read: all intact\n",
    )  # fmt: skip

    cluster.kill_host(hosts[0])
    for trainer in old:
        ray.kill(trainer)
    cluster.add_host()
    wait_for(lambda: any(e.kind == "whole_again" for e in tiered.events(job)))
    new = trainers(job, cluster.hosts[:2])
    wait_for(lambda: any(e.kind == "restored" and "0-1" in e.text for e in tiered.events(job)))
    code, text = tiered_command("events", "--job", job, "--json")
    kinds = [entry["kind"] for entry in json.loads(text)]
    story = ("begin", "committed", "host_lost", "degraded", "begin", "chosen", "restored")
    place = -1
    for kind in story:  # in this order
        place = kinds.index(kind, place + 1)
    code, text = tiered_command("status", "--job", job, "--json")
    status = json.loads(text)
    assert status["jobs"][0]["restores"] == [1, 1]
    assert "lost" in {host["state"] for host in status["hosts"]}

    # A coordinator that hangs is said, and started again; the journal outlives it.
    (process,) = (p for p in cluster.head_processes() if "Coordinator" in " ".join(p.cmdline()))
    process.suspend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiered.cluster.ANSWER_TIMEOUT_S", 2.0)
        code, text = tiered_command("status")
        assert (code, "`tiered up` starts it again" in text) == (4, True)
        code, text = tiered_command("doctor", "--no-network")
        assert (code, "✗ coordinator: no answer in 5 s" in text) == (1, True)
        code, text = tiered_command("up")
        assert (code, "it is started again" in text) == (0, True)
    again = wait_for(lambda: [e for e in tiered.events(job) if e.text == "started again"])
    assert again
    assert "host_lost" in {e.kind for e in tiered.events(job)}
    end(new)
    code, text = tiered_command("stop", job, "--yes")
    assert (code, "it was the last job" in text) == (0, True)
    code, text = tiered_command("ls", "--job", job)
    assert (code, "holds no checkpoints" in text) == (4, True)


def test_a_name_in_use_is_refused_until_its_trainer_hangs_or_dies(
    cluster: LocalCluster, job: str
) -> None:
    hosts = cluster.hosts
    first = trainer_of("first", hosts[0])
    assert start(first, job) == 0
    save(first, 1)
    pid = ray.get(first.pid.remote())
    second = trainer_of("second", hosts[1])
    with pytest.raises(
        tiered.NameInUseError, match=f"process {pid} on host .*'torchrun job first'"
    ):
        start(second, job)
    save(first, 2)  # it was not fenced off

    os.kill(pid, signal.SIGSTOP)
    try:
        assert start(second, job) == 3
    finally:
        os.kill(pid, signal.SIGCONT)
    for _ in range(2):
        with pytest.raises(tiered.FencedError):
            save(first, 3)
    zombies = [e for e in tiered.events(job) if e.kind == "zombie"]
    assert [(e.generation, e.step) for e in zombies] == [(1, 3)]
    save(second, 3)
    third = trainer_of("third", hosts[2])
    with pytest.raises(tiered.NameInUseError, match="torchrun job second"):
        start(third, job)
    gone = ray.get(second.pid.remote())
    ray.kill(second)
    wait_for(lambda: not psutil.pid_exists(gone))
    assert start(third, job) == 4


def test_stop_ends_one_job_and_leaves_the_other_alone(cluster: LocalCluster) -> None:
    names = [f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("over", "other")]
    over, other = names
    running = [trainer_of(name, host) for name, host in zip(names, cluster.hosts, strict=False)]
    for trainer, name, step in zip(running, names, (7, 9), strict=True):
        assert start(trainer, name) == 0
        save(trainer, step)

    code, text = tiered_command("stop", "--job", over, "--yes")
    assert (code, text) == (0, f"nothing of {over} is in memory any more\n")
    with pytest.raises(tiered.FencedError):
        save(running[0], 8)
    with pytest.raises(tiered.StepNotFoundError):
        tiered.recover(over)
    save(running[1], 10)
    assert tiered.recover(other).step == 10
    assert [job.name for job in tiered.cluster_status().jobs] == [other]
    again = trainer_of("again", cluster.hosts[2])
    assert start(again, over) == 0
    for trainer in (*running, again):
        ray.kill(trainer)

    assert not tiered.stop(over)
    assert wait_for(lambda: tiered.stop(other)), "no trainer of the last job is left"
    wait_for(lambda: not actors())
    trainers(other, cluster.hosts[:1])  # and everything starts again for whoever comes
    assert len(actors()) >= 2


def test_the_doctor_finds_no_problem_in_a_cluster_and_a_store_that_work(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.get(coordinator().ping.remote())
    code, text = tiered_command("doctor", "--s3", "s3://tests/doctor")
    assert code == 0, text
    assert "refuse to create twice: works" in text
    assert "coordinator: answers in 0." in text
    assert "0 problems" in text

    # The same cluster for a job that is too large, without its store, and by a clock that is off.
    now = SimpleNamespace(time=lambda: time.time() + 500.0, monotonic=time.monotonic)
    monkeypatch.setattr("tiered.cli.doctor.time", now)
    code, text = tiered_command(
        "doctor", "--no-network", "--s3", "s3://no-such-bucket/x", "--per-host", "1GB"
    )
    assert code == 1
    for found in (
        r"! memory on every host: object store 209\.7 MB, of which 167\.8 MB .*; the host has .*",
        r"✗ clock on .*-(499|500)\.\d s off",
        r"✗ room for the job: 1\.0 GB a host and save need .*; 127\.[\d.]+ has 209\.7 MB, .*",
        r"✗ s3://no-such-bucket/x: reach: NoSuchBucket .*",
    ):
        assert re.search(rf"^{found}\n  → \S", text, re.MULTILINE), (found, text)
    clocks = text.count("✗ clock on ")  # one line for hosts that are off by the same tenth
    assert f"{2 + clocks} problems" in text


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="gives hosts networks of their own: needs root")
def test_the_doctor_names_hosts_that_cannot_connect() -> None:
    program = """
from typer.testing import CliRunner
from chaos.host_network import HostNetwork
from chaos.local_cluster import LocalCluster
from tiered.cli.app import app

network = HostNetwork()
network.start()
try:
    with LocalCluster(hosts=2, object_store_bytes=100 << 20, network=network) as cluster:
        one, other = map(cluster.address_of, cluster.hosts)
        network.drop(one, other)
        done = CliRunner().invoke(app, ["doctor"])
        print(done.output.replace(one, "ONE").replace(other, "OTHER"), done.exit_code)
finally:
    network.close()
"""
    text = in_a_process_of_its_own([sys.executable, "-c", program])
    for way in ("ONE to OTHER", "OTHER to ONE"):
        found = rf"^✗ network {way}: no connection: .*\n  → open the ports"
        assert re.search(found, text, re.MULTILINE), text
    assert text.endswith(" 1\n")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm for itself: needs root")
def test_the_doctor_finds_what_is_wrong_with_a_machine(short_path: Path) -> None:
    program = """
import ray
from typer.testing import CliRunner
from tiered.cli.app import app

ray.init(num_cpus=1, object_store_memory=150 << 20, include_dashboard=False)
for words in (["up"], ["events"], ["doctor"]):
    done = CliRunner().invoke(app, words)
    print(done.output, done.exit_code)
"""
    mount = 'mount -t tmpfs -o size=100m tmpfs /dev/shm && ulimit -n 4096 && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", mount, "bash", sys.executable, "-c", program]
    more = {"RAY_AUTH_MODE": "disabled", "TMPDIR": str(short_path), "RAY_TMPDIR": str(short_path)}
    text = in_a_process_of_its_own(command, **more)
    assert re.search(r"open +Ray asks for no token: whoever reaches its ports", text)
    for found in (
        r"! hosts: 1, so no copy on another host",
        r"✗ memory on \S+: object store 157.3 MB, .*; /dev/shm has only 104.9 MB, so it .* disk",
        r"! open files on \S+: at most 4096 a process",
        r"! memory on \S+: the object store's is not preallocated: .*",
        r"! loss of a host: \d+ s without an answer .*",
        r"! access: whoever reaches Ray's ports may run code .*",
    ):
        assert re.search(rf"^{found}\n  → \S", text, re.MULTILINE), (found, text)
    assert text.endswith(" 1\n")


def in_a_process_of_its_own(command: list[str], **more: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **more}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN") if more else ("RAY_ADDRESS",):
        environment.pop(name, None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_each_command_does_what_it_says(cluster: LocalCluster, tmp_path: Path) -> None:
    """The life of a job, from an empty cluster to an empty cluster, by the command line."""
    # Jobs of the tests before are in the register: forgotten, which a coordinator that is started
    # again knows nothing of, or killed. What is stopped stays so.
    with contextlib.suppress(tiered.ConfigError):
        end_actors()
    wait_for(lambda: not actors())
    assert tiered_command("up")[0] == 0
    for left in tiered.cluster_status().jobs:
        tiered.stop(left.name)
    with contextlib.suppress(tiered.ConfigError):
        end_actors()
    wait_for(lambda: not actors())
    code, text = tiered_command("status")
    assert (code, "holds no checkpoints" in text, "tiered up" in text) == (4, True, True)
    assert tiered_command("up") == (0, "3 hosts hold checkpoints; see `tiered status`\n")
    assert tiered_command("up")[0] == 0
    code, text = tiered_command("status")
    assert (code, "3 of 3 hosts up" in text, "no job has saved anything yet" in text) == (0, 1, 1)
    assert tiered_command("ls") == (3, "no job has saved anything on this cluster yet\n")

    job, hosts = f"life-{uuid.uuid4().hex[:8]}", cluster.hosts
    uri = f"s3://tests/{job}"
    s3 = tiered.S3(uri, every_steps=2, keep=None)
    ranks = trainers(job, hosts[:2], s3=s3)
    for step in (2, 4):
        level = "durable"
        ray.get([t.save.remote(step, 10 * step + rank, level) for rank, t in enumerate(ranks)])
    ray.get([t.save.remote(5, 50 + rank) for rank, t in enumerate(ranks)])

    code, text = tiered_command("status")
    assert code == 0, text
    for fact in (f"job {job}", "2 of 2 copies of each shard", "on S3", "would restore", "free"):
        assert fact in text
    assert re.search(r"committed +step 5, \d+ s old", text)
    assert re.search(r"on S3 +step 4, \d+ s old", text)
    code, text = tiered_command("show", "4")
    matrix = [line.split() for line in text.splitlines() if re.match(r"[01] ", line)]
    assert [row[0] for row in matrix] == ["0", "1"]
    assert [sorted({*row[3:-4]} - {"·"}) for row in matrix] == [["own", "replica"]] * 2
    assert [row[-4:] for row in matrix] == [["yes", "2", "of", "2"]] * 2
    code, text = tiered_command("verify")
    assert (code, text) == (
        0, "8 copies in memory and 2 steps on S3 were read: all intact\n"
    )  # fmt: skip
    code, text = tiered_command("recover", job)
    assert (code, "step 5 (generation 1), 2 ranks" in text) == (0, True)
    code, text = tiered_command("recover", job, "--before", "5")
    assert "step 4 (generation 1), 2 ranks" in text
    code, text = tiered_command("recover", job, "--step", "3")
    assert (code, "step 3" in text) == (3, True)

    code, would = tiered_command("gc", job, "--keep", "1", "--dry-run")
    assert (code, "would free" in would, would.count("rank-0")) == (0, True, 2)  # of step 2
    code, did = tiered_command("gc", job, "--keep", "1")
    assert (code, did) == (0, would.replace("would free", "freed"))
    assert tiered_command("gc", job, "--keep", "1")[1] == "freed 0 B in 0 objects\n"

    assert tiered_command("drain", hosts[0][:12]) == (0, f"host {hosts[0][:8]} may go\n")
    code, text = tiered_command("show", "5", "--json")
    held = json.loads(text)["shards"]
    assert all(len({*s["own"], *s["replicas"]} - {hosts[0]}) == 2 for s in held)
    assert "leaving" in tiered_command("status")[1]
    cluster.kill_host(hosts[0])
    cluster.add_host()
    assert tiered_command("explain")[1].startswith("Step 5 (generation 1) would be restored now.")

    wait_for(
        lambda: (
            {h.node_id for h in tiered.cluster_status().hosts if h.state == "up"}
            == set(cluster.hosts)
        )
    )
    wait_for(
        lambda: tiered.cluster_status(job).jobs[0].newest_durable.step == 5
    )  # drain had it flushed
    answer = CliRunner().invoke(app, ["down"], input="n\n")
    assert (answer.exit_code, len(actors()) > 1) == (5, True)
    code, text = tiered_command("down", "--yes")
    assert (code, text) == (0, "ended 3 holders and the coordinator\n")
    wait_for(lambda: not actors())
    assert tiered_command("down", "--yes")[0] == 4
    code, text = tiered_command("recover", job, "--s3", uri)
    assert (code, "step 5 (generation 1), 2 ranks" in text, "rank 1: S3" in text) == (0, True, True)
    for trainer in ranks[1:]:
        ray.kill(trainer)


@pytest.fixture(scope="module")
def any_job(cluster: LocalCluster) -> Iterator[str]:
    """A job with one step in memory, for commands that have nothing to do with it."""
    name = f"any-{uuid.uuid4().hex[:8]}"
    trainer = trainer_of("any", cluster.hosts[-1])
    start(trainer, name)
    save(trainer, 1)
    yield name
    ray.kill(trainer)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("show 7", 3, "no tier has step 7 of job any; the newest: 1"),
        ("show x", 2, "Invalid value for 'step'"),
        ("ls --job nobody", 3, "no job 'nobody' on this cluster; there are: any"),
        ("ls --job a/b", 2, "job"),
        ("verify --step 7", 3, "no tier has step 7"),
        ("recover nobody", 3, "nobody"),
        ("recover any --step 9", 3, "step 9"),
        ("recover any --before 1", 3, "cannot be restored"),
        ("recover any --s3 bucket/prefix", 2, "must be s3://bucket"),
        ("gc any", 2, "no S3 tier"),
        ("gc any --keep 0", 2, "Invalid value for '--keep'"),
        ("gc any --s3 s3://no-such-bucket/x", 4, "no-such-bucket"),
        ("drain 10.9.9.9", 3, "no host is '10.9.9.9'; there are: "),
        ("stop nobody --yes", 3, "no job 'nobody'"),
        ("doctor --per-host much --no-network", 2, "is no size"),
        ("size -3", 2, "No such option"),
        ("web --port 99999", 2, "Invalid value for '--port'"),
        ("web --host no.such.host.invalid", 2, "cannot listen at no.such.host.invalid"),
        ("frobnicate", 2, "No such command"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_by_a_sentence_and_its_code(
    line: str, code: int, says: str, cluster: LocalCluster, any_job: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"])
    words = [any_job if word == "any" else word for word in line.split()]
    if words[0] in ("show", "verify"):
        words += ["--job", any_job]
    ended, text = tiered_command(*words)
    assert (ended, "Traceback" in text) == (code, False), text
    assert re.sub(r"\bany\b", any_job, says) in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS='127.0.0.1:1': no Ray cluster answers there"),
        ("nonsense", "Ray at 'nonsense': Invalid address format"),
        ("no.such.host.invalid:6379", "no Ray cluster answers there"),
        ("127.0.0.1:999999", "RAY_ADDRESS='127.0.0.1:999999'"),
        ("", "no Ray cluster is running here; set RAY_ADDRESS"),
    ],
)
def test_a_wrong_address_is_answered_by_a_sentence(address: str, says: str, tmp_path: Path) -> None:
    """In a process of its own: this one is connected."""
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment |= {"RAY_ADDRESS": address} if address else {}
    done = subprocess.run(
        [sys.executable, "-c", "from tiered.cli.app import main; main()", "status"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_whoever_has_another_token_is_kept_out_and_told_so(cluster: LocalCluster) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_ADDRESS": cluster.address}
    done = subprocess.run(
        [sys.executable, "-c", "from tiered.cli.app import main; main()", "status"],
        env={**os.environ, **wrong}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1]


def test_a_coordinator_of_another_release_is_refused_before_anything_else_is_asked(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.cluster.RELEASE", "9.9.9")
    with pytest.raises(tiered.ReleaseError, match=r"runs Tiered release 0\.1\.0, this process 9"):
        tiered.events()
