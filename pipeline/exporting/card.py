"""The exported model's README.md and nuteprune.json: how it was made and what it kept."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.utils import cached_file

from nuteprune.errors import UserError
from nuteprune.exporting.folding import Fold
from nuteprune.runs.checkpoint import CheckpointError, inside, read_json, update_manifest, write_atomic
from nuteprune.runs.fingerprint import fingerprint
from nuteprune.runs.rundir import Run
from nuteprune.runs.students import Student
from nuteprune.runs.words import code, markdown_words, one_line
from nuteprune.training.teachers import TEACHERS

log = logging.getLogger(__name__)

RECORD = "nuteprune.json"
"""What was kept, beside the weights: the sign of an export of ours."""
CARD = "README.md"
RESULTS = "\n## Results\n"
LICENCE = ("license", "license_name", "license_link")
"""Entries of a model's card that say what may be done with it."""
PAPER = "NutePrune (Li et al. 2024, [arXiv 2402.09773](https://arxiv.org/abs/2402.09773))"


@dataclass(frozen=True)
class Result:
    """What an export reached.

    Attributes:
        target, sparsity: wanted and removed share of the base's prunable parameters.
        parameters, base_parameters: all parameters, tied ones once.
        read, base_read: those of them that are read for one token; 0 where that is all of them (no experts).
        untied: parameters that untying the head added.
        difference: largest logit difference from the masked model over the largest logit, both float32.
        cast_difference: the same after the weights were cast, 0 where they stay float32.
        tokens: tokens of real text compared.
    """

    target: float
    sparsity: float
    parameters: int
    base_parameters: int
    untied: int
    difference: float
    cast_difference: float
    tokens: int
    read: int = 0
    base_read: int = 0


def kept_record(run: Run, student: Student, fold: Fold, result: Result) -> dict:
    """Contents of nuteprune.json: kept indices per layer, the original sizes, what was reached, fine-tuning steps."""
    spec, kept = fold.spec, fold.kept
    original = {"heads": spec.heads, "kv_heads": spec.kv_heads, "ffn": spec.ffn, "hidden": spec.hidden}
    if spec.experts > 1:
        original["experts"] = spec.experts
    return {
        "kept": kept.record(),
        "layers": spec.layers,
        "original": original,
        "sparsity": result.sparsity,
        "parameters": result.parameters,
        **({"read_for_a_token": result.read} if result.read else {}),
        "finetuned": student.facts.get("steps", 0),
        "recovered": student.facts.get("recovered", 0),
        "base": run.config.model.path,
    }


def model_card(run: Run, student: Student, fold: Fold, shape: str, dtype: str, result: Result) -> str:
    """README.md of the exported model.

    Args:
        run: the run it comes from.
        student: what was exported of it.
        fold: what was folded.
        shape: "uniform", "per_layer_ffn" or "per_layer".
        dtype: type of the saved weights.
        result: what the export reached.
    """
    base = run.config.model.path
    name = one_line(Path(base).name if Path(base).exists() else base)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [nuteprune, pruned]"]
    head += origin(base)
    return "\n".join([*head, "---", "", *_body(run, student, fold, name, shape, dtype, result), "", *_table(fold), ""])


def add_results(directory: Path, results: str) -> None:
    """Put an evaluation (Markdown) into an export's README.md, in place of an earlier one."""
    card = directory / CARD
    made = inside(directory, card.name).read_text(encoding="utf-8").split(RESULTS)[0].rstrip()
    write_atomic(card, f"{made}\n{RESULTS}\n{results}\n".encode())
    update_manifest(directory, card.name)


def check_distilled(directory: Path, export: Path, key: str = "distilled_from", stage: str = "distill") -> bool:
    """Whether a model that `stage` trained is in a directory; one without a readable record is none.

    Raises:
        UserError: one that comes from another export than the one that is there now.
    """
    if not (directory / RECORD).is_file():
        return False
    try:
        record = read_json(directory / RECORD)
    except CheckpointError as error:
        log.warning("%s: `nuteprune %s` makes the model again", error, stage)
        return False
    if record.get(key) != fingerprint(str(export)):
        raise UserError(
            f"{directory} was trained from another model than {export}: name the models in evaluate.models, or "
            f"remove {directory.parent} and run `nuteprune {stage}` again"
        )
    return True


def trained_card(card: str, row: tuple[str, str]) -> str:
    """The card of an export that was trained since, with a row that says so; what was measured before is left out."""
    line = f"| {row[0]} | {row[1]} |\n| Teacher |"
    return re.sub(r"(?m)^\| Teacher \|", lambda _: line, card.split(RESULTS)[0].rstrip() + "\n", count=1)


def origin(base: str) -> list[str]:
    """The licence and `base_model:` entries of a model that is made of a base; a local one has no name elsewhere."""
    licence = base_licence(base)
    found = yaml.safe_dump(licence, sort_keys=False).splitlines() if licence else []
    return found if Path(base).exists() else [*found, f"base_model: {one_line(base)}"]


def base_licence(base: str) -> dict[str, str | list[str]]:
    """The `LICENCE` entries of the base model's card, as far as it has them."""
    card = cached_file(base, "README.md", _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False,
                       _raise_exceptions_for_gated_repo=False)  # fmt: skip
    if card is None:
        return {}
    front = re.match(r"---\n(.*?)\n---", Path(card).read_text(encoding="utf-8-sig", errors="replace"), re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        facts = None
    return {key: facts[key] for key in LICENCE if _words(facts.get(key))} if isinstance(facts, dict) else {}


def _words(entry: object) -> bool:
    """Whether an entry of a card is one line of text, or a list of such."""
    lines = entry if isinstance(entry, list) else [entry]
    return bool(lines) and all(isinstance(line, str) and line and line == one_line(line) for line in lines)


def _body(run: Run, student: Student, fold: Fold, name: str, shape: str, dtype: str, result: Result) -> list[str]:
    config, facts, tuned = run.config, run.facts, student.facts
    train, lora = config.train, config.lora
    steps = f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs"
    trust = ", trust_remote_code=True" if shape != "uniform" else ""
    flags = " --model-impl transformers" if trust or fold.vllm_misreads else ""
    flags += " --trust-remote-code" if trust else ""
    lines = [
        f"# {markdown_words(name)}, pruned by {result.sparsity:.1%}",
        "",
        f"A structurally pruned {code(name)}: {result.base_parameters / 1e6:,.1f}M parameters became "
        f"{result.parameters / 1e6:,.1f}M. Made with {PAPER}: learned gates and LoRA on the frozen base, "
        f"{_teachers(run)}, then folded into the weights.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(path{trust})",
        "```",
        "",
        f"In vLLM: `vllm serve PATH{flags}`. `torch.compile(model, fullgraph=True)` makes one graph of it. To train "
        'LoRA on top: `peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")`.',
        "",
        "| | |",
        "|---|---|",
        f"| Removed share of the decoder projections | {result.sparsity:.2%} (target {result.target:.2%}) |",
        f"| Parameters | {result.parameters:,} of {result.base_parameters:,} |",
        *([f"| Read for one token | {result.read:,} of {result.base_read:,} |"] if result.read else []),
        f"| Gated units | {', '.join(config.gates.units)} |",
        f"| Shape | `{shape}` |",
        f"| Weights | {dtype} |",
        f"| Data | {_data_name(config.data.source)}, blocks of {config.data.seq_len} tokens |",
        f"| Training | {steps}, batch {train.batch_size}, LoRA rank {lora.rank}, learning rate "
        f"{facts.get('lora_lr', train.lora_lr):g} |",
        f"| Tokens | {facts.get('tokens', 0):,} |",
        f"| Teacher | {config.teacher.mode} |",
        f"| Largest logit difference from the masked model | {result.difference:.1e} of the largest logit, float32, "
        f"{result.tokens} tokens |",
    ]
    if tuned.get("recovered"):
        lines.append(f"| Recovered | {tuned['recovered']:,} steps on the same text, its units fixed |")
    if tuned.get("steps"):
        lines.append(
            f"| Fine-tuned | {tuned['steps']:,} steps on {_data_name(tuned['data'])}, {tuned['tokens']:,} tokens of "
            f"which {tuned['answer_tokens']:,} are answers |"
        )
    if result.cast_difference:
        lines.append(f"| The same after the cast to {dtype} | {result.cast_difference:.1e} |")
    if result.untied:
        lines.append(f"| Added by untying the output head (fractional hidden gates) | {result.untied:,} parameters |")
    return lines


def _teachers(run: Run) -> str:
    """What the student learned from; up to 20% by default no snapshot ever teaches."""
    if not TEACHERS[run.config.teacher.mode].taught:
        return "trained on text alone"
    earlier = any(snapshot.teaches for snapshot in run.snapshots)
    return "distilled from the intact model" + " and the student's own earlier snapshots" * earlier


def _data_name(source: str) -> str:
    """A local path is of no use to a reader, and may hold private names."""
    return code(Path(source).name).replace("|", "\\|")


def _table(fold: Fold) -> list[str]:
    spec, kept = fold.spec, fold.kept
    experts = f" Experts of {spec.experts} |" if spec.experts > 1 else ""
    lines = [
        f"{len(kept.layers)} of {spec.layers} layers, hidden size {len(kept.hidden)} of {spec.hidden}. "
        "Kept in each layer:",
        "",
        f"| Layer | Query heads of {spec.heads} | KV heads of {spec.kv_heads} | FFN units of {spec.ffn_units} |"
        f"{experts}",
        "|---|---|---|---|" + ("---|" if experts else ""),
    ]
    columns = [kept.heads, kept.kv_groups, kept.ffn, *([kept.experts] if experts else [])]
    rows = enumerate(zip(*columns, strict=True))
    return lines + [f"| {' | '.join(map(str, [i, *(len(units) for units in row)]))} |" for i, row in rows]
