"""What is written beside a run's own files is read again as it was."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest

from tiered.errors import ConfigError
from tiered.ray_train.summary import Summary, read_summary, write_summary
from tiered.ray_train.timeline import Recovery


def result(folder: Path) -> Any:
    return SimpleNamespace(filesystem=pyarrow.fs.LocalFileSystem(), path=str(folder))


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    recovery = Recovery(1, "gone", (0, 1), ("host",), 27, 25, 2, detect_s=1.5, total_s=9.0)
    summary = Summary("job", "run", 1, 2, (recovery,))
    write_summary(result(tmp_path), summary)
    assert read_summary(result(tmp_path)) == summary
    assert str(summary) == "failures: 1, lost steps: 2"


def test_a_run_without_the_callback_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Callback"):
        read_summary(result(tmp_path))
