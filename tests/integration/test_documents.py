"""Every block of README.md and docs/ is run: on one cluster of two hosts, with a real S3 server.

The Python blocks of a page are one script, in their order, as a reader would paste them; what a
block takes for granted is in `page_setups`. Commands are run as they stand. `ELSEWHERE` names the
few blocks that are not run here, each with the reason or the test that has it.
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiered
from chaos.local_cluster import LocalCluster
from chaos.s3_server import S3Server
from tests.integration.page_setups import SETUPS
from tests.unit.documents.blocks import PAGES, ROOT, Block, blocks_of
from tiered.cli.app import app
from tiered.ray_train import fast_recovery

pytestmark = pytest.mark.cluster

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = ("README.md", "docs/RAY_TRAIN.md", "docs/SAGEMAKER.md")
COMMAND = re.compile(r"(?:tiered|make|python|kubectl|set|ray) ")
ELSEWHERE = {  # (page, language) -> why its blocks are not run here
    ("docs/FRAMEWORKS.md", "python"): "files of examples/frameworks: test_ecosystem.py runs each",
    ("docs/KUBERNETES.md", "yaml"): "test_kubernetes.py holds them against KubeRay's schema",
    ("README.md", "json"): "test_s3_permissions.py: it is a policy of docs/S3.md",
    ("docs/S3.md", "json"): "test_s3_permissions.py: a server enforces these policies",
}
NOT_RUN = {  # beginning of a command -> why it is not run here
    "make ": "each target is one of CI's own runs, or takes minutes; test_blocks.py: it exists",
    "kubectl ": "needs Kubernetes; the command in the pod is run",
    "tiered web": "serves until it is ended: test_monitoring.py",
    "python -m chaos --scenario": "minutes, and network namespaces: test_chaos.py runs a short one",
    "python -m chaos --address": "minutes, on somebody's cluster",
    "python -m chaos --seed 7 --minutes": "minutes: test_chaos.py runs a short one",
    "python -m tiered.ray_train": "test_the_profile_is_what_a_shell_exports has the whole block",
    "set -a; . ./fast.env; ray start": "likewise, with `env` for Ray",
}


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[LocalCluster]:
    s3_server.create_bucket("bucket")  # as the pages call it
    with LocalCluster(hosts=2, cpus_per_host=2, object_store_bytes=250 << 20) as running:
        yield running


def is_drawing(block: Block) -> bool:
    return not block.language and not COMMAND.match(block.text)


def commands() -> Iterator[tuple[str, str]]:
    """Each command that a page shows in a block, with its place."""
    for block in BLOCKS:
        if not block.language and not is_drawing(block):
            for line in block.text.splitlines():
                command = line.partition(" #")[0].strip()
                if "kubectl exec" in command:
                    command = command.partition(" -- ")[2]
                yield str(block), command


def script(page: str) -> str:
    """The page's Python, as one program."""
    parts = ["import tiered"]
    for block in blocks_of(page, "python"):
        around = [
            text for (of, phrase), text in SETUPS.items() if of == page and phrase in block.text
        ]
        assert len(around) <= 1, block
        parts.append(_inside(around[0], block.text) if around else block.text)
    return "\n".join(parts)


def _inside(setup: str, block: str) -> str:
    indent = re.search(r"^( *)\{block\}", setup, re.MULTILINE)
    assert indent is not None
    return setup.format(block=textwrap.indent(block, indent[1]).removeprefix(indent[1]))


def test_each_block_is_run_or_it_is_said_why_not() -> None:
    left = [
        str(block)
        for block in BLOCKS
        if not is_drawing(block)
        and block.language
        and (block.page, block.language) not in ELSEWHERE
        and not (block.language == "python" and block.page in PYTHON_PAGES)
    ]
    assert left == []
    used = {(b.page, b.language) for b in BLOCKS}
    assert ELSEWHERE.keys() <= used
    ecosystem = Path(__file__).with_name("test_ecosystem.py").read_text()
    for example in sorted((ROOT / "examples" / "frameworks").glob("*.py")):
        assert example.stem in ecosystem
    shown = [command for _, command in commands()]
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in shown), beginning
    for page, phrase in SETUPS:
        assert any(phrase in block.text for block in blocks_of(page, "python")), phrase


@pytest.mark.timeout(300)  # half a minute on a quiet machine
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs(page: str, cluster: LocalCluster, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(script(page))
    environment = {
        **os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    if page == "README.md":
        assert "starting at step 0" in done.stdout
        assert {p.name for p in tmp_path.iterdir()} >= {"checkpoint", "model", "dcp", "model.pt"}


@pytest.fixture(scope="module")
def one_job(cluster: LocalCluster) -> None:
    """Jobs that the pages have left are stopped, and another one has saved a step."""
    with tiered.Checkpointer("shown", tiered.Memory(every_steps=1), rank=0, world_size=1) as ckpt:
        ckpt.restore({"step": 0})
        handle = ckpt.save(0, {"step": 0})
        assert handle is not None
        handle.wait("replicated", timeout_s=60)
    for job in tiered.cluster_status().jobs:
        if job.name != "shown":
            tiered.stop(job.name)


RUN = [(place, line) for place, line in commands() if not line.startswith(tuple(NOT_RUN))]


@pytest.mark.parametrize(("place", "line"), RUN, ids=[line for _, line in RUN])
@pytest.mark.usefixtures("one_job")
def test_a_command_runs(place: str, line: str, tmp_path: Path) -> None:
    program, *words = line.split()
    if program == "tiered":
        done = CliRunner().invoke(app, words)
        assert done.exit_code in (0, 1), (place, done.output)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.output
    else:
        assert words[:2] == ["-m", "chaos"], place
        folder = tmp_path / "chaos_out" / "mix-7"
        folder.mkdir(parents=True)
        packed = ROOT / "chaos" / "results" / "mix-12" / "history.jsonl.gz"
        with (folder / "history.jsonl").open("wb") as history:
            subprocess.run(["gunzip", "-c", packed], stdout=history, check=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *words]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_the_profile_is_what_a_shell_exports(tmp_path: Path) -> None:
    (block,) = (b for b in blocks_of("docs/RAY_TRAIN.md", "") if "fast.env" in b.text)
    shown = block.text.replace("ray start --head", "env")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euc", shown], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert exported.items() >= fast_recovery().environment.items()
