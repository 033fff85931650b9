"""The one line that tells an error."""

import errno
import os

import pytest

from nuteprune.errors import first_line
from nuteprune.runs.checkpoint import write_atomic


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n first \nsecond"), "first"),
        (RuntimeError(), "RuntimeError"),
        (OSError(" \n"), "OSError"),
        (KeyError("gates"), "no 'gates' in it"),
        (ValueError("x" * 500), "x" * 200),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_atomic(file, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(file, b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]
