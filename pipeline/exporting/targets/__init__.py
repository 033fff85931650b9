"""The forms in which a small model is written: each a file, and a line of `TARGETS`.

They are written in this order. The first is what an export reads back and checks.
"""

from nuteprune.exporting.targets.base import ExportPlan, Target
from nuteprune.exporting.targets.deci import Deci
from nuteprune.exporting.targets.gguf import Gguf
from nuteprune.exporting.targets.stock import Transformers

TARGETS: dict[str, Target] = {"transformers": Transformers(), "deci": Deci(), "gguf": Gguf()}
