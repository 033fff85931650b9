"""One teacher: the intact model."""

from __future__ import annotations

from nuteprune.model.layers import View
from nuteprune.training.teachers.base import Teacher


class Intact(Teacher):
    """The intact model in each step."""

    def view(self, step: int, total: int, sparsity: float) -> View:
        """See `Teacher`."""
        return self.activate(None)
