"""Who teaches: each policy a file, and a line of `TEACHERS` under its value of `teacher.mode`.

Stages and the planner ask a policy what it does; none of them knows its name.
"""

from typing import Literal

from nuteprune.training.teachers.base import Teacher
from nuteprune.training.teachers.constant import Intact, Nobody
from nuteprune.training.teachers.numerous import Numerous

TEACHERS: dict[str, type[Teacher]] = {"numerous": Numerous, "intact": Intact, "none": Nobody}


def constant_mode(taught: bool) -> Literal["intact", "none"]:
    """The mode in which the teacher never changes, or in which there is none."""
    return "intact" if taught else "none"
