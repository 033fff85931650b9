"""All stages of a run on this machine, one after the other: what `nuteprune run` does."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import yaml

from nuteprune import api
from nuteprune.config import Config, beyond_recipe, load_config
from nuteprune.data.text import load_text
from nuteprune.errors import UserError
from nuteprune.model.loading import read_config
from nuteprune.parallel.sizes import total_parameters
from nuteprune.planning.machine import Choice, Machine, choose, this_machine
from nuteprune.runs.checkpoint import write_atomic
from nuteprune.stages.trim import RECORD
from nuteprune.training.memory import LIMIT

log = logging.getLogger(__name__)

HELD_OUT_SHARE, HELD_OUT_MOST = 20, 50
"""One document of so many is held out of the training text, and never more than that."""
LARGE_VOCABULARY = 0.25
"""Share of a model's parameters from which on `nuteprune trim` is mentioned."""
SETTINGS, HELD_OUT = "run.yaml", "heldout.jsonl"


class StageFailed(RuntimeError):
    """A stage that several ranks ran has failed; it has said why."""

    def __init__(self, stage: str, exit_code: int):
        super().__init__(
            f"{stage} ended with exit code {exit_code}; mend what it says and start the same command again"
        )
        self.exit_code = exit_code


def run(config: Config) -> str:
    """Prepare, prune, fine-tune where there are records, export and evaluate; returns what to print at the end.

    Each stage that is finished already returns at once, so the same command goes on where it stopped. The settings that
    were chosen for this machine are shown first, and written to `run.yaml` in the run's directory.

    Raises:
        UserError: no model; as the stages otherwise.
        StageFailed: a stage of several ranks failed.
    """
    if not config.model.path:
        raise UserError("run: name a model, e.g. `nuteprune run HuggingFaceTB/SmolLM2-135M --sparsity 0.3`")
    if not config.run_dir:
        name = f"{Path(config.model.path).name}-{config.sparsity.target:.0%}".rstrip("%")
        config = load_config(config, [f"run_dir=runs/{name}"])
    _, spec = read_config(config.model.path)  # a model that is not there costs nothing else; its type is not chosen yet
    machine = this_machine()
    choices, plan = choose(config, machine, spec)
    config = load_config(config, [f"{choice.key}={choice.value}" for choice in choices])
    directory = Path(config.run_dir)
    config, held_out = hold_out(config)
    log.info("%s", table(machine, choices + held_out))
    words = spec.vocab * spec.hidden * (1 if spec.tied else 2) / total_parameters(spec)
    if words > LARGE_VOCABULARY and not (Path(config.model.path) / RECORD).is_file():
        log.info(
            "%.0f%% of the parameters are the vocabulary's, which is not pruned: `nuteprune trim` leaves out what a "
            "text never uses", 100 * words,
        )  # fmt: skip
    if plan is not None:
        log.info("planned: %.1f hours", plan.hours)
    head = f"# nuteprune run --config {directory / SETTINGS}\n"
    settings = yaml.safe_dump(beyond_recipe(config), sort_keys=False)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / SETTINGS, (head + settings).encode())
    tune, distill = ["finetune"] * bool(config.finetune.data), ["distill"] * bool(config.distill.steps)
    stages = ["prepare", "prune", *tune, "export", *distill, "evaluate"]
    told = ""
    for number, stage in enumerate(stages, 1):
        log.info("stage %d of %d: %s", number, len(stages), stage)
        if machine.ranks > 1 and stage in ("prune", "finetune", "distill"):
            _on_all_cards(stage, directory / SETTINGS, machine.ranks)
        else:
            result = getattr(api, stage)(config)
            told = importlib.import_module(f"nuteprune.stages.{stage}").summary(config, result)
    return told


def _on_all_cards(stage: str, settings: Path, ranks: int) -> None:
    """Run a stage, and again where one of the ranks learned that it takes too many sequences at a time."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    limits = None
    while limits != (limits := set(settings.parent.rglob(f"{LIMIT}*"))):
        done = subprocess.run([*launch, "-m", "nuteprune", stage, "--config", str(settings)], check=False)
        if not done.returncode:
            return
    raise StageFailed(stage, done.returncode)


def hold_out(config: Config) -> tuple[Config, list[Choice]]:
    """The run with its last documents kept for evaluation, where no text is named for that and there are enough."""
    data, file = config.data, Path(config.run_dir) / HELD_OUT
    if config.evaluate.text:
        return config, []
    texts = load_text(data.source, data.documents, data.text_field)["text"]
    count = min(len(texts) // HELD_OUT_SHARE, HELD_OUT_MOST)
    if not count:
        return config, []
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[-count:])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, lines.encode())
    why = f"the last {count} of {len(texts)} documents are not trained on"
    chosen = [Choice("data.documents", len(texts) - count, why), Choice("evaluate.text", [str(file)], why)]
    return load_config(config, [f"{choice.key}={json.dumps(choice.value)}" for choice in chosen]), chosen


def table(machine: Machine, choices: list[Choice]) -> str:
    """What was chosen for a machine and why, a line each."""
    rows = [(choice.key, str(choice.value), choice.why) for choice in choices]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {why}" for key, value, why in rows]
    return "\n".join([f"chosen for {machine.name}:", *lines] if rows else [f"on {machine.name}, as configured"])
