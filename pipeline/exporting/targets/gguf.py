"""llama.cpp: model.gguf, and a Modelfile for Ollama."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nuteprune.exporting.gguf_model import FILE, TYPES, gguf_architecture
from nuteprune.exporting.gguf_quants import K_QUANTS, check_quantizer, write_quantized
from nuteprune.exporting.gguf_vocab import vocabulary
from nuteprune.exporting.targets.base import ExportPlan, Target
from nuteprune.model.loading import Base


class Gguf(Target):
    """Written where `export.gguf` names a type."""

    def check(self, plan: ExportPlan) -> bool:
        """See `Target`."""
        if plan.export.gguf not in (*TYPES, *K_QUANTS):
            return False
        gguf_architecture(plan.fold.spec, plan.shape, plan.small)
        vocabulary(plan.tokenizer)
        check_quantizer(plan.export.gguf)
        return True

    def write(self, directory: Path, plan: ExportPlan, model: PreTrainedModel) -> None:
        """See `Target`."""
        architecture = gguf_architecture(plan.fold.spec, plan.shape, plan.small)
        write_quantized(directory, model, plan.tokenizer, architecture, plan.export.gguf)
        # Ollama takes the chat template from the file too.
        (directory / "Modelfile").write_text(f"FROM ./{FILE}\n", encoding="utf-8")


def write_anew(directory: Path, shape: str, kind: str, base: Base) -> None:
    """Write model.gguf of the weights that an export's directory holds now.

    Args:
        directory: of a small model.
        shape, kind: as its record has them.
        base: what it was pruned from.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    write_quantized(directory, model, base.tokenizer, gguf_architecture(base.spec, shape, model.config), kind)
