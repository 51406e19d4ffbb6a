"""The documentation as a site: it builds without a warning, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_a_warning_and_stands_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.name: page.read_text() for page in tmp_path.glob("*.html")}
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\s\">]+)", text)
        assert loaded == [], name
    assert "fully_shard" in pages["FRAMEWORKS.html"], "snippets are included"
    assert "tiered-explain" in pages["CLI.html"]
    assert "tiered.checkpointer.Checkpointer" in pages["API.html"]
    assert (tmp_path / "benchmarks" / "results" / "compare.png").is_file()
