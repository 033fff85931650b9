"""Numerous teachers: the student's own earlier snapshots (paper, section 3.3)."""

from nuteprune.config import TeacherConfig
from nuteprune.model.layers import View
from nuteprune.training.teachers.base import Teacher


class Numerous(Teacher):
    """The sparsest snapshot at least `lag` intervals below a mark, the intact model where there is none.

    While the sparsity rises the mark is the student's own; from the step at which the student has reached the target
    on, it falls an interval at a time, to 0 at the end of the run, so that the lessons walk back to the intact model.
    `share` keeps out snapshots so sparse that, in a short run, they know too little to teach.
    """

    records = True

    def view(self, step: int, total: int, sparsity: float) -> View:
        """See `Teacher`; the next step's teacher is fetched beside the work of this one."""
        index, following = (self.index(s, total, sparsity) for s in (step, step + 1))
        view = self.activate(index)
        self.prefetch(following)
        return view

    def sparsity(self, step: int, total: int, sparsity: float) -> float:
        """See `Teacher`."""
        index = self.index(step, total, sparsity)
        return 0.0 if index is None else self.snapshots[index].sparsity

    def index(self, step: int, total: int, sparsity: float) -> int | None:
        """Of the snapshot that teaches; None for the intact model."""
        mark = sparsity
        if self.reached is not None:
            gone = (step - self.reached) / max(1, total - self.reached)
            mark -= self.intervals(gone * mark) * self.config.interval
        usable = [i for i, s in enumerate(self.snapshots) if s.teaches and self.may_teach(s.sparsity, mark)]
        return max(usable, key=lambda i: self.snapshots[i].sparsity, default=None)

    @classmethod
    def limit(cls, config: TeacherConfig, mark: float) -> float:
        """`lag` intervals below the mark, and at most `share` of it."""
        return min(mark - config.lag * config.interval, config.share * mark)
