"""Settings of earlier versions: what took their place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nuteprune.errors import UserError

BEFORE_0_2 = object()
REMOVED: dict[str, tuple[str, Any]] = {
    "gates.importance_batches": ("gates.importance_tokens counts tokens; export a run before 0.2 with its own version",
                                 BEFORE_0_2),
    "evaluate.sample_prompt": ("evaluate.prompts counts prompts from the text", None),
    "tracking.tensorboard": ("tracking.report_to names the places", None),
    "train.lora_schedule": ("it goes with train.lora_optimizer: a cosine for scaled, the paper's linear for adamw",
                            lambda s: "linear" if s["train.lora_optimizer"] == "adamw" else "cosine"),
    "train.lora_warmup": ("it goes with train.lora_optimizer: 3% of the steps for scaled, none for adamw",
                          lambda s: 0.0 if s["train.lora_optimizer"] == "adamw" else 0.03),
    "train.beta2": ("AdamW's second moment decays by 0.999", 0.999),
    "train.weight_decay": ("LoRA has no weight decay", 0.0),
    "train.grad_clip": ("the norm of LoRA's gradient is clipped at 1", 1.0),
    "train.ranks": ("the launcher sets the number of ranks, and the log names it", None),
    "train.max_bad_steps": ("10 bad steps in a row end a run", None),
    "gates.init_drop_rate": ("gates.init=drop_rate begins at 0.01", 0.01),
    "gates.noise_end": ("the noise falls to a fifth of gates.noise, or stays where gates.settle=1",
                        lambda s: s["gates.noise"] / (1 if s["gates.settle"] == 1 else 5)),
    "gates.clamp": ("log-alpha is clamped at log 100 with gates.optimizer=adam, and not with sgd",
                    lambda s: math.log(100) if s["gates.optimizer"] == "adam" else 0.0),
    "sparsity.schedule": ("it goes with sparsity.constraint: cubic for projection, the paper's linear for lagrangian",
                          lambda s: "cubic" if s["sparsity.constraint"] == "projection" else "linear"),
    "sparsity.multiplier_lr": ("the multipliers' rate is the paper's, 0.1", 0.1),
    "loss.layer": ("what loss.layer_weight weighs is the paper's mean squared error (raw)",
                   lambda s: "raw" if s["loss.layer_weight"] else None),
    "loss.layer_reduction": ("what loss.layer_weight weighs is the paper's sum over layers",
                             lambda s: "sum" if s["loss.layer_weight"] else None),
    "loss.chunk": ("logits are computed for 256 tokens at once", None),
    "recover.lr": ("recovery begins at the train.lora_lr of the run", 0.0),
    "finetune.unusable": ("records that cannot be learned are left out, and the log counts them", None),
    "checkpoint.resume": ("a run goes on by itself; remove its directory to start it anew", None),
    "tracking.log_every": ("each step is logged", None),
    "tracking.image_every": ("a picture is drawn every 50 steps", None),
    "export.ladder_per_layer": ("export the ladder a second time with export.shape=per_layer", None),
    "export.ffn_multiple": ("gates.ffn_multiple of the run holds", 0),
    "export.hidden_multiple": ("gates.hidden_multiple of the run holds", 0),
    "export.tensor_parallel": ("gates.tensor_parallel of the run holds", 0),
    "export.hub_private": ("a new repository is private; its page on the hub makes it public", None),
    "export.shard_size": ("files hold at most 5 GB", None),
    "export.check_tokens": ("logits are compared on 512 tokens", None),
    "evaluate.text_field": ("data.text_field names the column of every text", None),
    "evaluate.stride": ("windows stand side by side", None),
    "evaluate.speed": ("evaluate.batch_sizes=[] measures no speed", None),
}  # fmt: skip
"""By name: what took its place, and the value that equals what is done now, which may hang on other settings; None: the
setting never changed what a run learns."""


def refuse_removed(settings: Iterable[str], source: str) -> None:
    """Raise `UserError` for the first that is no longer a setting."""
    for key in settings:
        if key in REMOVED:
            raise UserError(f"{source}: {key} is no longer a setting: {REMOVED[key][0]}")


def check_removed(gone: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` where settings that a run had and that have gone do not equal what is done with its others."""
    for key, value in gone.items():
        instead, now = REMOVED[key]
        now = now(settings) if callable(now) else now
        if now not in (None, value):
            raise UserError(f"{source}: {key}={value!r} is no longer a setting: {instead}")
