"""llama.cpp: model.gguf, and a Modelfile for Ollama."""

from pathlib import Path

from transformers import PreTrainedModel

from nuteprune.exporting.gguf_model import FILE, TYPES, gguf_architecture
from nuteprune.exporting.gguf_quants import K_QUANTS, check_quantizer, write_quantized
from nuteprune.exporting.gguf_vocab import vocabulary
from nuteprune.exporting.targets.base import ExportPlan, Target


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
