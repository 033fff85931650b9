"""No teacher: the loss is the language model's."""

from __future__ import annotations

from nuteprune.training.teachers.base import Teacher


class Nobody(Teacher):
    """No teacher in any step."""

    taught = False

    def view(self, step: int, total: int, sparsity: float) -> None:
        """See `Teacher`."""
