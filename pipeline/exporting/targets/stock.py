"""Hugging Face transformers: weights, configuration, tokenizer."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from nuteprune.exporting import modeling_ragged
from nuteprune.exporting.targets.base import ExportPlan, Target

SHARD = "5GB"
"""Largest safetensors file."""


class Transformers(Target):
    """A directory that `from_pretrained` loads, with a modelling file where layers have sizes of their own.

    The export writes it first, before its cast too, and checks what it reads back: here the model is not checked yet.
    """

    def write(self, directory: Path, plan: ExportPlan, model: PreTrainedModel) -> None:
        """See `Target`."""
        for old in directory.glob("model*.safetensors*"):  # an earlier save may have had more shards
            old.unlink()
        plan.tokenizer.save_pretrained(directory)
        model.save_pretrained(directory, max_shard_size=SHARD)
        # Copied as it is: transformers refuses to save some of the generation configs that it loads.
        plan.generation.to_json_file(directory / "generation_config.json", use_diff=True)
        if plan.shape != "uniform":
            shutil.copyfile(modeling_ragged.__file__, directory / "modeling_ragged.py")
