"""A run's student as it was trained: base weights, gates and LoRA, to look into or to compare an export with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.config import Config
from nuteprune.masks import Gates, sparsity_of
from nuteprune.model.layers import View, build_view
from nuteprune.model.loading import load_model, read_base
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import discover
from nuteprune.runs.students import newest_student, open_run


@dataclass(frozen=True, repr=False)
class MaskedModel:
    """A student over its base model.

    Attributes:
        gates: gate values by kind (`gates.as_dict()`), 0 where a unit is removed.
        sparsity: removed share of the prunable parameters.
        tokenizer: the base model's.
    """

    gates: Gates
    sparsity: float
    tokenizer: PreTrainedTokenizerBase
    _model: PairedModel
    _view: View

    def __repr__(self) -> str:
        return f"MaskedModel({self._model.spec.family}, {self.sparsity:.1%} of the prunable parameters removed)"

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]."""
        device = next(self._model.parameters()).device
        return self._model.logits(input_ids.to(device), self._view)


def load(config: Config) -> MaskedModel:
    """The student that `config.export` asks for; raises `UserError` as the export does."""
    trained, world = open_run(config.run_dir, config.model), discover()
    base = read_base(trained.config.model)
    spec, model = base.spec, load_model(base, world.device)
    student = newest_student(config.export, trained, spec)
    paired = PairedModel(model, spec, trained.config.lora)
    gates = student.gates.to(world.device)
    lora = {key: tuple(t.to(world.device) for t in pair) for key, pair in student.lora.items()}
    view = build_view(spec, gates, lora, student.scaling, paired.dtype)
    return MaskedModel(gates, sparsity_of(spec, gates), base.tokenizer, paired, view)
