"""What a teacher policy is."""

from typing import ClassVar

from nuteprune.model.layers import View
from nuteprune.training.teachers.bank import SnapshotBank


class Teacher(SnapshotBank):
    """Who teaches each step of a stage; `teachers.TEACHERS` lists the policies by `teacher.mode`.

    Every rank has one and asks it the same, so that all get the same answer: it calls no other rank. What it teaches
    with are the bank's snapshots, which the stage records, saves and restores, or the intact model. Which of them it
    needs in memory `limit` says.
    """

    taught: ClassVar[bool] = True
    """Whether there is a teacher; without one the loss is the language model's."""
    records: ClassVar[bool] = False
    """Whether snapshots of the student are recorded, and planned for."""
    reached: int | None = None
    """First step at which the student had the full target sparsity."""

    def observe(self, step: int, student_sparsity: float, target: float) -> None:
        """Note the step at which the student first is within half an interval of the final target.

        By its state, not by the schedule: a Lagrangian may lag behind it.
        """
        if self.reached is None and student_sparsity >= target - self.config.interval / 2:
            self.reached = step

    def view(self, step: int, total: int, sparsity: float) -> View | None:
        """The view that teaches step `step` of `total` a student of this expected sparsity; None where nobody does.

        The same object again while the teacher is the same: making one costs a copy to the accelerator.
        """
        raise NotImplementedError

    def sparsity(self, step: int, total: int, sparsity: float) -> float:
        """The sparsity of that teacher, 0 of the intact model; without its view, so that the planner can ask too."""
        return 0.0
