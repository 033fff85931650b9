"""What an export target is, and the plan that it is given."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import Config, ExportConfig
from nuteprune.exporting.folding import Fold
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import Student


@dataclass(frozen=True)
class ExportPlan:
    """How a base model becomes the small one.

    Attributes:
        run, student: what is exported.
        fold: what its gates and LoRA do to the weights.
        small: configuration of the small model.
        shape: "uniform", "per_layer_ffn" or "per_layer".
        dtype: type of the exported weights.
        tokenizer, generation: the base model's.
        export: what is asked for.
    """

    run: Run
    student: Student
    fold: Fold
    small: PreTrainedConfig
    shape: str
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    export: ExportConfig

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.run.config

    @property
    def dtype_name(self) -> str:
        """The type's name without `torch.`."""
        return str(self.dtype).removeprefix("torch.")


class Target:
    """A form in which the small model is written; `targets.TARGETS` lists them. An export is of one process."""

    def check(self, plan: ExportPlan) -> bool:
        """Whether it is written; asked before anything is.

        Raises:
            UserError: it is asked for, and cannot hold this model.
        """
        return True

    def write(self, directory: Path, plan: ExportPlan, model: PreTrainedModel) -> None:
        """Write the files of the target; those of targets before it are there.

        Args:
            directory: takes the place of the output directory when all is written.
            model: the small model as read back from the directory and checked; float32, rounded to the exported type.
        """
        raise NotImplementedError
