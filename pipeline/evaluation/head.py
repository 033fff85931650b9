"""What a causal language model does behind its decoder: last hidden states to logits.

The model's own forward does it, so a scale or a cap of the logits is in them, and heads of other devices are found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.errors import UserError

LOGIT_ROWS = 256
LOGIT_BYTES = 256 * 2**20
"""The logits that exist at once: of so many positions at most, in so many bytes of float32."""


class Head:
    """Logits of states that a model's decoder gave.

    Args:
        model: causal language model.

    Attributes:
        rows: positions to be asked for at once, see `LOGIT_BYTES`.

    Raises:
        UserError: the model's forward does not call its decoder (`base_model`), so its head is not known.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._output = type(model.base_model(input_ids=token, use_cache=False))
        self._calls = 0
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.rows = max(1, min(LOGIT_ROWS, LOGIT_BYTES // (4 * vocabulary)))

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [T, V] in float32 of last hidden states [T, D]."""
        before = self._calls

        def decoder(*_, **__):
            self._calls += 1
            return self._output(last_hidden_state=states[None])

        with _in_place_of_forward(self.model.base_model, decoder):
            logits = self.model(inputs_embeds=states[None], use_cache=False).logits[0].float()
        if self._calls != before + 1:
            raise UserError(f"{type(self.model).__name__} does not call its base_model: its logits cannot be scored")
        return logits


@contextlib.contextmanager
def _in_place_of_forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Call a function in place of a module's forward, which accelerate may have replaced already."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
