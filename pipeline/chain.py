"""All stages of a run on this machine, one after the other: what `nuteprune run` does."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, beyond_recipe, flatten, load_config, to_dict
from nuteprune.data.instructions import worded
from nuteprune.data.text import JOINT, load_text
from nuteprune.evaluation.compare import checked as check_evaluation
from nuteprune.exporting.gguf_model import gguf_architecture
from nuteprune.exporting.gguf_quants import check_quantizer
from nuteprune.exporting.gguf_vocab import vocabulary
from nuteprune.exporting.small import output_directory
from nuteprune.masks import check_target
from nuteprune.model.loading import read_base, read_config
from nuteprune.parallel.sizes import total_parameters
from nuteprune.planning.machine import Choice, Machine, choose, this_machine
from nuteprune.planning.report import stages_text
from nuteprune.runs.checkpoint import write_atomic
from nuteprune.runs.directories import LEFT_OUT
from nuteprune.runs.lock import alone
from nuteprune.stages import prune
from nuteprune.stages.trim import RECORD
from nuteprune.training.loop import check_directory, make_directory
from nuteprune.training.memory import LIMIT
from nuteprune.training.signals import Preempted, stop_signals

log = logging.getLogger(__name__)

HELD_OUT_SHARE, HELD_OUT_MOST, SHORTEST = 20, 50, 64
"""One document of so many is held out of the training text, no more than that many once they fill a window; the fewest
tokens of a window that is chosen where they do not."""
LARGE_VOCABULARY = 0.25
"""Share of a model's parameters from which on `nuteprune trim` is mentioned."""
SETTINGS, HELD_OUT = "run.yaml", "heldout.jsonl"


LAUNCH = """
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    run.main(sys.argv[1:])
except ChildFailedError as failed:
    codes = [each.exitcode for each in failed.failures.values()]
    sys.exit(next((code for code in codes if code > 0 and code != 75), 75))
"""
"""torchrun, whose own exit code is 1 whatever its ranks' is. A rank that a signal killed is a lost one."""


class StageFailed(RuntimeError):
    """A stage that several ranks ran has failed; it has said why."""

    def __init__(self, stage: str, exit_code: int):
        super().__init__(
            f"{stage} ended with exit code {exit_code}; mend what it says and start the same command again"
        )
        self.exit_code = exit_code


def run(config: Config, given: Collection[str]) -> tuple[Config, dict]:
    """Prepare, prune, export, distil, fine-tune where there are records, and evaluate; returns settings and report.

    A stage of training that is finished already returns at once, so the same command goes on where it stopped. The
    settings that were chosen for this machine are shown first, and written to `run.yaml` in the run's directory.

    Args:
        config: the settings.
        given: keys of those that the user set (`given_keys`); the others are chosen.

    Raises:
        UserError: no model, or another process runs in the directory; as the stages otherwise.
        StageFailed: a stage of several ranks failed.
        Preempted: a signal came.
    """
    config, spec = checked(config)
    machine, directory = this_machine(), Path(config.run_dir)
    config, choices, held_out = settle(config, given, machine, spec)
    left_out = [choice.why for choice in choices if choice.key == "distill.steps" and not choice.value]
    head = f"# nuteprune run --config {directory / SETTINGS}\n"
    settings = beyond_recipe(config, {*given, *(choice.key for choice in choices)})
    check_directory(config, prune.Pruning.free)
    told_text = (config.evaluate.text and not held_out) or config.evaluate.protocol == "published"
    check_evaluation(config, [config.model.path] if told_text else [])
    make_directory(config)
    tune = ["finetune"] * bool(config.finetune.data)
    # Where the small model's own weights learn, they learn from records too, and last.
    behind = ["export", "distill", *tune] if config.distill.steps else [*tune, "export"]
    stages = ["prepare", "prune", *behind, "evaluate"]
    with stop_signals() as stop, alone(directory, "run"):
        if held_out:
            write_atomic(directory / HELD_OUT, held_out.encode())
        if left_out and not (directory / LEFT_OUT).exists():
            write_atomic(directory / LEFT_OUT, json.dumps({"distill": left_out[0].removeprefix("left out: ")}).encode())
        write_atomic(directory / SETTINGS, (head + yaml.safe_dump(settings, sort_keys=False)).encode())
        for number, stage in enumerate(stages, 1):
            if stop.received:  # in the last step of the one before
                raise Preempted(stop.nothing)
            log.info("stage %d of %d: %s", number, len(stages), stage)
            if machine.ranks > 1 and stage in ("prune", "finetune", "distill"):
                _on_all_cards(stage, directory / SETTINGS, machine.ranks)
            else:
                result = importlib.import_module(f"nuteprune.stages.{stage}").run(config)
    return config, result


def checked(config: Config) -> tuple[Config, ArchSpec]:
    """The settings with the run's directory, and the model's architecture; what cannot be is refused here."""
    if not config.run_dir:
        name = f"{Path(config.model.path).name}-{config.sparsity.target:.0%}".rstrip("%")
        config = load_config(config, [f"run_dir=runs/{name}"])
    architecture, spec = read_config(config.model.path)  # its type is not chosen yet
    if config.finetune.data:
        next(worded(config.finetune, read_base(config.model).tokenizer))
    if config.export.gguf != "none":
        shape = config.gates.shape if config.export.shape == "as_trained" else config.export.shape
        gguf_architecture(spec, shape, architecture)
        check_quantizer(config.export.gguf)
        vocabulary(read_base(config.model).tokenizer)
    output_directory(config.export.output, Path(config.run_dir), config.model.path)
    return config, spec


def settle(
    config: Config, given: Collection[str], machine: Machine, spec: ArchSpec
) -> tuple[Config, list[Choice], str]:
    """The settings with what is chosen here, or was when the run began, the choices, and the text that is held out."""
    directory, plan = Path(config.run_dir), None
    if begun := (directory / "config.yaml").is_file():
        choices = [Choice(key, value, "as this run began") for key, value in chosen_before(directory, config, given)]
    else:
        choices, plan = choose(config, given, machine, spec)
    config = with_choices(config, choices)
    check_target(spec, config.gates, config.sparsity.target, config.lora.targets)
    kept, lines = held_before(directory, config, given) if begun else hold_out(config, given)
    choices += kept
    log.info("%s", table(machine, choices))
    words = spec.vocab * spec.hidden * (1 if spec.tied else 2) / total_parameters(spec)
    if words > LARGE_VOCABULARY and not (Path(config.model.path) / RECORD).is_file():
        log.info(
            "%.0f%% of the parameters are the vocabulary's, which is not pruned: `nuteprune trim` leaves out what a "
            "text never uses", 100 * words,
        )  # fmt: skip
    if plan is not None:
        log.info("planned, never measured on a card:\n%s", stages_text(plan))
    return with_choices(config, choices), choices, lines


def with_choices(config: Config, choices: list[Choice]) -> Config:
    """The settings with what was chosen."""
    return load_config(config, [f"{choice.key}={json.dumps(choice.value, ensure_ascii=False)}" for choice in choices])


def chosen_before(directory: Path, config: Config, given: Collection[str]) -> list[tuple[str, Any]]:
    """What a run that has begun has where its user leaves it open, by key, as far as it differs from `config`."""
    began, now = (flatten(to_dict(each)) for each in (load_config(directory), config))
    # The last three follow from the text again.
    own = {*given, "recipe", "run_dir", "data.documents", "evaluate.text", "evaluate.window"}
    return [(key, value) for key, value in began.items() if key not in own and now[key] != value]


def held_before(directory: Path, config: Config, given: Collection[str]) -> tuple[list[Choice], str]:
    """`hold_out` of a run that has begun: what it held out then, since the text may be another by now, or gone."""
    began, text, why = load_config(directory), directory / HELD_OUT, "as this run began"
    documents, named = began.data.documents, [Path(name).name for name in began.evaluate.text]
    said = {"data.documents", "evaluate.text", "evaluate.protocol"}.intersection(given)
    if named == [HELD_OUT] and text.is_file() and not said:
        own = {"data.documents": documents, "evaluate.text": [str(text)], "evaluate.window": began.evaluate.window}
        choices = [Choice(key, value, why) for key, value in own.items() if key not in given]
        return choices, text.read_text(encoding="utf-8")
    kept, lines = hold_out(config, given)
    if kept and documents == config.data.documents:  # evaluate.text was named then
        return [Choice("data.documents", documents, f"{why}, so none is held out")], ""
    if not kept and "data.documents" not in given:
        kept = [Choice("data.documents", documents, why)]
    return kept, lines


def _on_all_cards(stage: str, settings: Path, ranks: int) -> None:
    """Run a stage, and again where one of the ranks learned that it takes too many sequences at a time."""
    launch = [sys.executable, "-c", LAUNCH, "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch, "-m", "nuteprune", stage, "--config", str(settings)]
    # As many threads a rank as it has cores; torchrun would give it one.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (psutil.cpu_count(logical=False) or 1) // ranks))
    limits = None
    while limits != (limits := set(settings.parent.rglob(f"{LIMIT}*"))):
        # In a session of its own, so that a Ctrl-C comes here alone.
        with subprocess.Popen(
            command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": threads}
        ) as launched:
            try:
                code = launched.wait()
            except Preempted:
                signal.signal(signal.SIGINT, partial(_at_once, launched.pid))
                for one in _ranks(launched.pid):
                    with suppress(psutil.NoSuchProcess):
                        one.terminate()
                raise Preempted(f"{stage} was told to stop: what it saved stands above, start again") from None
        if not code:
            return
    raise StageFailed(stage, code)


def _ranks(launcher: int) -> list[psutil.Process]:
    """What a launcher has started, or itself. Told to stop, it would kill its ranks 30 seconds later."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        return process.children() or [process]
    return []


def _at_once(launcher: int, *_args) -> None:
    """The handler of a second Ctrl-C: ends the ranks, their launcher and this process."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def hold_out(config: Config, given: Collection[str]) -> tuple[list[Choice], str]:
    """The last documents of the training text for the report, as lines of JSON, and the settings that say so.

    None of them where the user names a text or another protocol, or where so few documents hold no window to score.
    """
    data, evaluate = config.data, config.evaluate
    if evaluate.text or evaluate.protocol == "published":
        return [], ""
    texts = load_text(data.source, data.documents, data.text_field)["text"]
    tokenizer = read_base(config.model).tokenizer
    held_out: list[str] = []
    tokens = 0
    for text in reversed(texts[-(len(texts) // HELD_OUT_SHARE) :] if len(texts) >= HELD_OUT_SHARE else []):
        if len(held_out) >= HELD_OUT_MOST and tokens >= evaluate.window:
            break
        held_out.insert(0, text)
        tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if held_out:  # as they are scored: across two documents line ends may merge into one token
        tokens = len(tokenizer(JOINT.join(held_out), add_special_tokens=False, verbose=False)["input_ids"])
    short = tokens < evaluate.window
    if short and (tokens < SHORTEST or "evaluate.window" in given):
        log.warning(
            "of %d documents (a .txt file is one) too few can be held out: the report scores what was trained on; give "
            "a text of its own with evaluate.text=…", len(texts),
        )  # fmt: skip
        return [], ""
    count = len(held_out)
    why = f"the last {count} of {len(texts)} documents are not trained on"
    choices = [
        Choice("data.documents", len(texts) - count, why),
        Choice("evaluate.text", [str(Path(config.run_dir) / HELD_OUT)], why),
        *[Choice("evaluate.window", tokens, f"they are {tokens} tokens")] * short,
    ]
    return choices, "".join(json.dumps({data.text_field: text}, ensure_ascii=False) + "\n" for text in held_out)


def table(machine: Machine, choices: list[Choice]) -> str:
    """What was chosen for a machine and why, a line each."""
    rows = [(choice.key, str(choice.value), choice.why) for choice in choices]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {why}" for key, value, why in rows]
    return "\n".join([f"chosen for {machine.name}:", *lines] if rows else [f"on {machine.name}, as configured"])
