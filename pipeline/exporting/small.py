"""The small model: folded, written, and checked against the masked model before anything replaces what was there."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nuteprune.arch import ArchSpec
from nuteprune.config import Config
from nuteprune.data.prepared import TrainingText
from nuteprune.errors import UserError
from nuteprune.exporting.card import RECORD, Result, kept_record, model_card
from nuteprune.exporting.folding import exported_parameters, fold_model, model_class, plan_fold, small_config
from nuteprune.exporting.publish import check_repository, push
from nuteprune.exporting.targets import TARGETS, ExportPlan, Target
from nuteprune.masks import Gates, sparsity_of
from nuteprune.model.layers import build_view
from nuteprune.model.loading import Base, check_dtype, in_float32, load_model, read_base, stored_dtype
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.sizes import read_parameters
from nuteprune.runs.checkpoint import MANIFEST, atomic_directory
from nuteprune.runs.directories import DISTILLED, distill_directory
from nuteprune.runs.log import no_bar
from nuteprune.runs.students import export_gates, newest_student, open_run

log = logging.getLogger(__name__)

CHECK_TOKENS = 512
"""Tokens of real text on which logits are compared before an export ends."""
LOGIT_TOLERANCE = 1e-3
"""Largest difference of two float32 logits, relative to the largest logit."""
COUNT_TOLERANCE = 1e-3
"""The counted and the computed sparsity may be this far apart."""


class ExportError(RuntimeError):
    """The small model does not compute what the masked model computes, or has another size: nothing was written."""


def export_model(config: Config) -> Path:
    """Export the run in `config.run_dir`; returns the directory of the small model.

    Raises:
        UserError: no finished run there, no name of a repository to push to, an output directory that is not ours to
            replace, a sparsity the run has no snapshot of, or a structure that the asked shape cannot hold.
        ExportError: the small model failed its checks.
    """
    check_repository(config.export)
    trained = open_run(config.run_dir, config.model)
    output = output_directory(config.export.output, trained.directory, trained.config.model.path)
    base = read_base(in_float32(trained.config.model))
    student = newest_student(config.export, trained, base.spec)
    shape = export_gates(config.export, trained).shape
    dtype = exported_dtype(base, config.export.dtype)
    model = load_model(base)
    fold = plan_fold(base.spec, student.gates, student.lora, student.scaling)
    small = small_config(model.config, fold, shape)
    plan = ExportPlan(trained, student, fold, small, shape, dtype, base.tokenizer, model.generation_config,
                      config.export)  # fmt: skip
    first, *others = [target for target in TARGETS.values() if target.check(plan)]
    tokens = real_text(TrainingText(str(trained.directory), trained.config.data, base), CHECK_TOKENS)
    with atomic_directory(output) as directory:
        result, exported = write_model(first, directory, model, plan, tokens)
        for target in others:
            target.write(directory, plan, exported)
        write_record(directory, plan, result)
    log.info("exported %s: %.2f%% of the prunable parameters removed, %s parameters left (%s before)", output,
             100 * result.sparsity, f"{result.parameters:,}", f"{result.base_parameters:,}")  # fmt: skip
    if config.export.push_to_hub:
        push(output, config.export)
    return output


def output_directory(wanted: str, run_dir: Path, model: str) -> Path:
    """Where the export of a run of `model` goes; raises `UserError` if something else than an earlier one is there."""
    output = Path(wanted) if wanted else run_dir / "export"
    if output.resolve() == Path(model).resolve():
        raise UserError(f"export.output {output} is the base model itself: choose another directory")
    if output.resolve() == (distill_directory(run_dir) / DISTILLED).resolve():
        raise UserError(f"export.output {output} is the place of the distilled model: choose another directory")
    if output.name in ("", ".."):
        raise UserError(f"export.output {output} cannot be replaced as a whole: name a directory below it")
    if output.exists() and not output.is_dir():
        raise UserError(f"export.output {output} is a file: choose a directory")
    ours = (output / MANIFEST).is_file() and (output / RECORD).is_file()
    if output.is_dir() and any(output.iterdir()) and not ours:
        raise UserError(f"export.output {output} holds files that are not an earlier export: choose another one")
    return output


def exported_dtype(base: Base, asked: str) -> torch.dtype:
    """The type of the exported weights (`as_base`: that of the base's files); raises `UserError` as `check_dtype`."""
    stored = stored_dtype(base) if asked == "as_base" else getattr(torch, asked)
    check_dtype(base.spec, str(stored).removeprefix("torch."), "export.dtype")
    return stored


def real_text(text: TrainingText, count: int) -> Tensor:
    """About `count` tokens [N, T] of the run's own training text, in blocks no longer than those of training."""
    length = min(text.data.seq_len, count)
    blocks = text.load()
    if blocks is None:
        documents = min(text.data.documents or count, count)  # a document has at least one token
        blocks = replace(text, data=replace(text.data, documents=documents, seq_len=length)).pack()
    return blocks[: -(-count // length), :length]


def write_model(
    target: Target, directory: Path, base: PreTrainedModel, plan: ExportPlan, tokens: Tensor
) -> tuple[Result, PreTrainedModel]:
    """Fold the base into a small model, write it as a target and check what was written; consumes the base.

    The check is on float32 weights read back from the directory; they are cast, and saved again, only after it.
    """
    fold, before = plan.fold, base.num_parameters()
    wanted = masked_logits(base, plan, tokens)
    model = fold_model(base, plan.small, fold, partial(tqdm, desc="folding layers", unit="layer", disable=no_bar()))
    save = partial(target.write, directory, plan)
    save(model)
    del model
    reload = partial(model_class(plan.small).from_pretrained, directory, dtype=torch.float32,
                     attn_implementation=in_float32(plan.config.model).attention)  # fmt: skip
    model = reload()
    sparsity = check_count(fold.spec, plan.student.gates, model)
    difference = check_logits(model, tokens, wanted)
    cast_difference = 0.0
    if plan.dtype != torch.float32:
        save(model.to(plan.dtype))
        model = reload()
        cast_difference = largest_difference(model, tokens, wanted)
        if not math.isfinite(cast_difference):
            raise ExportError(f"the weights overflow in {plan.dtype_name}: use export.dtype=bfloat16")
    log.info("logits differ by %.1e of the largest one on %d tokens (cast to %s: %.1e)", difference, tokens.numel(),
             plan.dtype_name, cast_difference)  # fmt: skip
    untied = model.lm_head.weight.numel() if fold.unties else 0
    if untied:
        log.warning("hidden gates between 0 and 1: the output head was untied, which adds %s parameters", f"{untied:,}")
    result = Result(plan.student.target, sparsity, model.num_parameters(), before, untied, difference, cast_difference,
                    tokens.numel(), *_read(plan, model))  # fmt: skip
    return result, model


def _read(plan: ExportPlan, model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that are read for a token, of the small model and of the base; zeros where that is all of them."""
    spec, kept = plan.fold.spec, plan.fold.kept
    if spec.experts == 1:
        return 0, 0
    every_width = kept.ffn_widths
    unread = sum(sum(every_width[i][spec.top_k :]) for i in kept.layers)
    return model.num_parameters() - unread * spec.ffn_cost(len(kept.hidden)), read_parameters(spec)


@torch.no_grad()
def masked_logits(base: PreTrainedModel, plan: ExportPlan, tokens: Tensor) -> list[Tensor]:
    """Logits [T, V] of the masked model for each block of tokens; the base keeps its weights."""
    fold = plan.fold
    paired = PairedModel(base, fold.spec, plan.config.lora)
    view = build_view(fold.spec, plan.student.gates.to(torch.float32), fold.lora, fold.scaling, torch.float32)
    logits = [paired.logits(block[None], view)[0] for block in tokens]
    base.model.layers = nn.ModuleList(wrapped.layer for wrapped in paired.layers)
    return logits


@torch.no_grad()
def largest_difference(model: PreTrainedModel, tokens: Tensor, wanted: list[Tensor]) -> float:
    """Largest difference of the model's logits from the wanted ones, over the largest wanted logit."""
    model.eval()
    pairs = zip(tokens, wanted, strict=True)
    differences = torch.stack([(model(block[None]).logits[0] - logits).abs().max() for block, logits in pairs])
    largest = torch.stack([logits.abs().max() for logits in wanted]).max()
    return float(differences.max() / largest)  # a NaN stays one, which Python's max would lose


def check_logits(model: PreTrainedModel, tokens: Tensor, wanted: list[Tensor]) -> float:
    """`largest_difference`, with `ExportError` where it is above `LOGIT_TOLERANCE` or not a number."""
    difference = largest_difference(model, tokens, wanted)
    if not difference <= LOGIT_TOLERANCE:
        raise ExportError(
            f"the small model's logits differ from the masked model's by {difference:.1e} of the largest logit "
            f"(allowed: {LOGIT_TOLERANCE:g}); nothing was exported, please report this with the run's config.yaml"
        )
    return difference


def check_count(spec: ArchSpec, gates: Gates, model: PreTrainedModel) -> float:
    """Removed share of the prunable parameters, counted from tensors; `ExportError` if the gates promise another."""
    counted, promised = 1 - exported_parameters(model) / spec.prunable, sparsity_of(spec, gates)
    if abs(counted - promised) > COUNT_TOLERANCE:
        raise ExportError(f"the small model lacks {counted:.4f} of the parameters, its gates say {promised:.4f}")
    return counted


def write_record(directory: Path, plan: ExportPlan, result: Result) -> None:
    """Write README.md and nuteprune.json."""
    card = model_card(plan.run, plan.student, plan.fold, plan.shape, plan.dtype_name, result)
    (directory / "README.md").write_text(card, encoding="utf-8")
    record = kept_record(plan.run, plan.student, plan.fold, result) | {"shape": plan.shape, "gguf": plan.export.gguf}
    (directory / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
