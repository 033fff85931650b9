"""The one line that tells an error."""

import pytest

from nuteprune.errors import first_line


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
