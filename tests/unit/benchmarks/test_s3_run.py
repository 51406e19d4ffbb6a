import json
from pathlib import Path

from rich.console import Console

from benchmarks.s3_run import Figures, show, write

MIB = 1 << 20


def test_the_table_shows_medians_beside_ours_and_who_is_missing(tmp_path: Path) -> None:
    found = {
        "tiered": Figures([1.0, 2.0, 9.0], [1.0], [0.5, 0.5, 0.5], [2.0]),
        "rclone": Figures([3.0], [0.5], [3.0], [0.1]),
        "s3torchconnector": Figures(unavailable="pip says no"),
    }
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(show(found, 1000 * MIB, 2))
    console.file.close()
    lines = console.export_text().splitlines()
    ours, rclone, connector = (next(x for x in lines if f" {name} " in x) for name in found)
    cells = [cell.strip() for cell in ours.strip("│").split("│")]
    assert cells == ["tiered", "524", "1.00 x", "6%", "1049", "1.00 x", "100%"]
    assert "1.50 x" in rclone
    assert "0.50 x" in rclone
    assert "pip says no" in connector
    write(tmp_path / "s3.json", found, {"size_bytes": 7})
    assert json.loads((tmp_path / "s3.json").read_text())["movers"]["rclone"]["flush_s"] == [3.0]
