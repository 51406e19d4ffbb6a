import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.image_file import ImageBytes, ImageFile

BUFFERS = st.lists(st.binary(max_size=20), max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 50)),
        st.tuples(st.just("seek"), st.integers(0, 80)),
        st.tuples(st.just("skip"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 5)),
    ),
    max_size=12,
)


def image_of(*buffers: bytes) -> ImageBytes:
    return ImageBytes(np.frombuffer(data, np.uint8) for data in buffers)


@given(BUFFERS, st.data(), STEPS)
def test_a_part_reads_like_one_run_of_bytes(
    buffers: list[bytes], data: st.DataObject, steps: list[tuple[str, int]]
) -> None:
    image, whole = image_of(*buffers), b"".join(buffers)
    start = data.draw(st.integers(0, len(whole)))
    size = data.draw(st.none() | st.integers(0, len(whole) + 3))
    model = io.BytesIO(whole[start:] if size is None else whole[start : start + size])
    file = ImageFile(image, start, size)
    assert image.size_bytes == len(whole)
    assert file.size_bytes == len(model.getvalue())
    assert b"".join(image.pieces(start, file.size_bytes)) == model.getvalue()
    for step, value in steps:
        match step:
            case "read":  # short at the end of a buffer, and empty only at that of the file
                found, at = file.read(value), model.tell()
                rest = model.read(value)
                assert rest.startswith(found)
                assert bool(found) == bool(rest)
                assert value >= 0 or found == rest
                model.seek(at + len(found))
            case "seek":
                assert file.seek(value) == model.seek(value)
            case "skip":
                assert file.seek(value, io.SEEK_CUR) == model.seek(value, io.SEEK_CUR)
            case _:
                assert file.seek(value, io.SEEK_END) == model.seek(value, io.SEEK_END)
        assert file.tell() == model.tell()


def test_an_image_copies_nothing() -> None:
    array = np.zeros(4, np.uint8)
    image = ImageBytes([array])
    array[:] = 7
    file = ImageFile(image)
    assert file.read() == b"\x07" * 4
    file.seek(1)
    assert np.shares_memory(np.frombuffer(file.read(2), np.uint8), array)
    file.seek(1)
    assert file.readinto(target := bytearray(2)) == 2
    assert target == b"\x07" * 2
    assert all(np.shares_memory(np.frombuffer(piece, np.uint8), array) for piece in image.views)


def test_a_file_is_read_only_and_has_a_start() -> None:
    file = ImageFile(image_of(b"abc"))
    assert file.readable()
    assert file.seekable()
    assert not file.writable()
    with pytest.raises(io.UnsupportedOperation):
        file.truncate(0)
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-4, io.SEEK_END)


def test_each_read_is_announced_with_the_bytes_that_there_are() -> None:
    told: list[int] = []
    file = ImageFile(image_of(b"abcde", b"fgh"), 2, 5, told.append)
    assert [bytes(file.read(size)) for size in (2, 9, 9, 9)] == [b"cd", b"e", b"fg", b""]
    assert told == [2, 1, 2]
