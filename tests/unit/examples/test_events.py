"""Events: what is written is read, once, and half a line is not."""

from pathlib import Path

from examples.demo.events import EventReader, EventWriter


def test_a_reader_returns_each_event_once(tmp_path: Path) -> None:
    reader = EventReader(tmp_path)
    assert reader.read_new() == []
    with EventWriter(tmp_path, rank=1, node_id="n1") as writer:
        first = writer.write("step", step=0, loss=(0.1).hex(), seconds=0.3)
        assert reader.read_new() == [first]
        second = writer.write("step", step=1, loss=(0.2).hex(), seconds=0.3)
        assert reader.read_new() == [second]
    assert reader.read_new() == []
    assert (second.rank, second.node_id, second.data["step"]) == (1, "n1", 1)


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    reader = EventReader(tmp_path)
    with EventWriter(tmp_path, rank=0) as writer:
        event = writer.write("finished")
    path = next(tmp_path.iterdir())
    line = path.read_bytes()
    path.write_bytes(line + line[:20])
    assert reader.read_new() == [event]
    path.write_bytes(line + line)
    assert reader.read_new() == [event]


def test_events_of_several_processes_are_ordered_by_time(tmp_path: Path) -> None:
    with EventWriter(tmp_path, rank=1) as one, EventWriter(tmp_path, rank=0) as other:
        expected = [one.write("entered"), other.write("entered"), one.write("finished")]
    assert EventReader(tmp_path).read_new() == expected
