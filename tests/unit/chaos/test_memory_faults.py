"""Bytes that another process has mapped are changed behind its back."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.faults.memory import cut, flipped, write_into
from replication.shared import Place, mappings

OWNER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
    print("mapped", flush=True)
    sys.stdin.read()
"""


def place_of(path: Path, offset: int, size_bytes: int) -> Place:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        lines = Path("/proc/self/maps").read_text().splitlines()
        inode = str(os.fstat(file.fileno()).st_ino)
        one = next(m for m in mappings(lines) if m.file[1] == inode)
    return Place(one.file, offset, size_bytes)


def test_a_bit_of_a_shared_mapping_flips_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "store"
    content = bytes(range(256)) * 64
    path.write_bytes(content)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mapped\n"
        place = place_of(path, 8192, 1000)
        write_into(owner.pid, place, lambda old: flipped(old, 0.5))
        elsewhere = Place(("00:00", "1"), 0, 10)
        with pytest.raises(OSError, match="does not map the place"):
            write_into(owner.pid, elsewhere, lambda old: old)
        assert owner.stdin is not None
        owner.stdin.close()
    changed = path.read_bytes()
    differing = [i for i, (a, b) in enumerate(zip(content, changed, strict=True)) if a != b]
    assert differing == [8192 + 500]
    assert changed[8692] ^ content[8692] == 0x10


def test_a_cut_leaves_zeros_and_always_changes_something() -> None:
    assert cut(b"abcdef", 0.5) == b"abc\0\0\0"
    assert cut(b"abc\0\0\0", 0.5) == b"abc\1\0\0"
    assert cut(b"abcdef", 0.0) == bytes(6)
