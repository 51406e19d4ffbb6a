"""An environment of its own for each peer, made on demand, that shares the installed torch.

It is a virtual environment whose path ends with the running one's packages: what a peer brings
comes first, and torch is not installed a second time. Packages are installed without their
dependencies; what a peer needs and the running environment has not is in its own list, each of one
version.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import ROOT

FOLDER = ROOT / ".bench" / "venvs"
INSTALL_TIMEOUT_S = 300.0
DONE = ".installed"


class InstallError(Exception):
    """A peer's environment could not be made; says what pip said last."""


def python_of(name: str, requirements: Sequence[str], folder: Path = FOLDER) -> Path:
    """Return the interpreter of the environment for `name`, made if it is not there.

    Args:
        name: Of the peer.
        requirements: Pinned; none of their dependencies is installed. If there are none, the
            running interpreter will do.
        folder: Of all environments.

    Raises:
        InstallError: The packages could not be installed.
    """
    if not requirements:
        return Path(sys.executable)
    home = folder / name
    python = home / "bin" / "python"
    wanted = _fingerprint(requirements)
    done = home / DONE
    if done.exists() and done.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(home)])
    shared = sysconfig.get_paths()["purelib"]
    own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (own / "shared.pth").write_text(shared + "\n")
    # Ignored: what the running environment has in the same version, whose programs are not here.
    _run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
         "--ignore-installed", "--no-warn-script-location",
         "--disable-pip-version-check", *requirements]
    )  # fmt: skip
    done.write_text(wanted)
    return python


def _fingerprint(requirements: Sequence[str]) -> str:
    text = "\n".join([sys.version, sysconfig.get_paths()["purelib"], *requirements])
    return hashlib.sha256(text.encode()).hexdigest()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"not installed within {INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError(lines[-1] if lines else done.stderr.strip()[-300:])
