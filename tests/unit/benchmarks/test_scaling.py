import pytest

from benchmarks.scaling import AXES, points


def test_one_thing_changes_along_an_axis() -> None:
    found = list(points(AXES, 4096, 256, 64))
    assert [p.value for p in found if p.axis == "MiB a rank"] == [64, 256, 1024, 4096]
    assert [p.value for p in found if p.axis == "tensors"] == [10, 100, 1000, 10_000, 100_000]
    assert [p.value for p in found if p.axis == "ranks a host"] == [1, 2, 4, 8]
    assert [p.value for p in found if p.axis == "hosts"] == [2, 4, 8]
    for point in found:
        assert point.plan.spec.tensors == (point.value if point.axis == "tensors" else 60)
        assert point.plan.ranks == (point.value if point.axis == "ranks a host" else 1)
        assert point.plan.training_hosts == (point.value if point.axis == "hosts" else 1)


def test_axes_can_be_shrunk() -> None:
    found = list(points(AXES, 256, 1, 8))
    assert [p.value for p in found if p.axis == "MiB a rank"] == [64, 256]
    assert max(p.value for p in found if p.axis == "tensors") == 10_000
    assert all(p.plan.spec.size_bytes <= 256 << 20 for p in found)


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ValueError, match="no axis 'colour'"):
        list(points(["colour"], 1, 1, 1))
