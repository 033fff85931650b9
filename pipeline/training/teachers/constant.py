"""Teachers that never change."""

from nuteprune.model.layers import View
from nuteprune.training.teachers.base import Teacher


class Intact(Teacher):
    """The intact model teaches each step."""

    def view(self, step: int, total: int, sparsity: float) -> View:
        """See `Teacher`."""
        return self.activate(None)


class Nobody(Teacher):
    """No step has a teacher."""

    taught = False

    def view(self, step: int, total: int, sparsity: float) -> None:
        """See `Teacher`."""
