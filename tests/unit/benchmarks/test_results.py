import json
from pathlib import Path

import pytest

from benchmarks.results import SCHEMA, Run, SchemaError
from tests.unit.benchmarks.samples import run


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = run()
    written.write(tmp_path / "deep" / "run.json")
    assert Run.read(tmp_path / "deep" / "run.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run.json"]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run().write(path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "schema": SCHEMA + 1}))
    with pytest.raises(SchemaError, match=f"schema {SCHEMA + 1}"):
        Run.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "cases": [{}]}'])
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(SchemaError):
        Run.read(path)


def test_committed_results_can_be_read() -> None:
    folder = Path(__file__).parents[3] / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        if "schema" in json.loads(path.read_text()):
            assert Run.read(path).cases
