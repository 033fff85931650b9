"""Words of the command line: stages, their flags and help. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import argparse

from nuteprune.config import STAGE_SECTIONS, describe

STAGES = {
    "prepare": "fetch the model, tokenise and pack the text, once and without a GPU",
    "prune": "learn gates and LoRA on the frozen base model, taught by earlier snapshots of the student",
    "recover": "train snapshots of a run on, their gates fixed, so that each rung of a ladder is worth its size",
    "finetune": "train the distilled model, or else the pruned student's LoRA, on instruction records",
    "export": "write the student (or a snapshot of the run, or a ladder of them) as a small Hugging Face model",
    "distill": "train the weights of the exported model, taught by the intact one",
    "evaluate": "perplexity, continuations, speed and tasks of models side by side, as a page, Markdown and JSON",
}
RUN = "all stages one after the other on this machine, with settings chosen for it; goes on where it stopped"
TRIM = "copy a model with only those tokens in its vocabulary that a text uses: smaller before anything is pruned"
TRIM_FLAGS: dict[str, tuple[str | int, str]] = {
    "--out": ("", "directory of the result"),
    "--tokens": (0, "at most so many tokens, the most frequent ones; 0: all that the text has"),
}
"""Flags of `trim`: default and meaning."""
SHORTCUTS = {
    "trim": {"--data": "data.source"},
    "run": {
        "--sparsity": "sparsity.target",
        "--data": "data.source",
        "--out": "run_dir",
        "--gguf": "export.gguf",
    },
    "plan": {"--sparsity": "sparsity.target", "--data": "data.source"},
    "prepare": {"--data": "data.source"},
    "prune": {"--sparsity": "sparsity.target", "--data": "data.source"},
    "recover": {"--ladder": "recover.ladder", "--sparsity": "recover.ladder"},
    "finetune": {"--data": "finetune.data", "--sparsity": "finetune.sparsity"},
    "export": {
        "--sparsity": "export.sparsity",
        "--from": "export.source",
        "--ladder": "export.ladder",
        "--gguf": "export.gguf",
        "--push-to-hub": "export.push_to_hub",
    },
    "evaluate": {"--blocks": "evaluate.blocks", "--push-to-hub": "export.push_to_hub"},
}
"""Flags of a stage that stand for one key; a list is given with commas."""
SUBMIT = "submit the stages of a run as dependent jobs of a SLURM cluster, or print a cluster file to edit"
SUBMIT_FLAGS = {
    "--config": "YAML file with the run's settings (or recipe=NAME behind), with a run_dir that every node sees",
    "--cluster": "how the cluster is used: an edited copy of what --example prints",
    "--from": "submit this stage and those after it, finished or not",
    "--sweep": "instead, all stages once for each entry of a YAML list of settings, as a job array",
}
"""Flags of `submit` that take a value; slurm/submit.sh reads them."""
STATUS = "how far a run is: stages, steps, speed, SLURM jobs and the first error of a failed one"
DISTRIBUTED = ("prune", "recover", "finetune", "distill")
"""Stages that several ranks run together."""
MODEL_WORDS = "directory or hub id of the model (for model.path=MODEL), and settings"
OVERRIDES = "directory of a run (for --config RUN/config.yaml), and settings that win over the file"
PLAN = "whether a run fits on a cluster, how long it takes and its settings, from the model's config.json alone"
PLANNED = "directory, config.json, hub id or a name such as llama-3.1-70b, for model.path"
PLAN_FLAGS: dict[str, tuple[str | float, str]] = {
    "--nodes": (1, "nodes"),
    "--gpus-per-node": (8, "GPUs of a node"),
    "--gpu": (
        "",
        "a card by its name: h100, a100, 4090, …; an unknown name is answered with all (default h100, or, "
        "given --gpu-memory alone, the slowest known card with that memory)",
    ),
    "--gpu-memory": ("", "memory of a GPU, such as 24GB; it and the following win over the card's own"),
    "--intra-bandwidth": ("", "one way per GPU inside a node, such as 450GB/s"),
    "--inter-bandwidth": ("", "one way per GPU between nodes: its NIC's"),
    "--host-bandwidth": ("", "one way per GPU to host memory"),
    "--flops": ("", "dense peak of a GPU in the model's type, such as 989TFLOP/s"),
    "--mfu": (0.4, "share of that peak which is reached"),
    "--disk-bandwidth": ("1GB/s", "of the file system that model and checkpoints lie in"),
    "--tokens-per-document": (427.0, "assumed length, to count the steps of an epoch (427: mean of C4)"),
    "--out": ("", "directory for plan.yaml and the DeepSpeed files that it names"),
}
"""Flags of `plan`: default and meaning."""
DRY_RUN_FLAGS = ("--world-size", "--gpus-per-node", "--gpu", "--gpu-memory")


class Version(argparse.Action):
    """Prints the version, which is looked for only then."""

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import version

        parser.exit(message=f"nuteprune {version('nuteprune')}\n")


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="nuteprune", description="Structured pruning with numerous teachers.")
    top.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    # The deepspeed launcher adds it; the variable LOCAL_RANK says the same.
    top.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    run = commands.add_parser("run", help=RUN, description=_sentence(RUN))
    _settings(run, "MODEL | key.sub=value", MODEL_WORDS,
              "YAML file with the run's settings, such as the run.yaml of an earlier start")  # fmt: skip
    _shortcuts(run, "run")
    _plan(commands.add_parser("plan", help=PLAN, description=_sentence(PLAN)))
    trim = commands.add_parser("trim", help=TRIM, description=_sentence(TRIM))
    for flag, (default, meaning) in TRIM_FLAGS.items():
        _with_default(trim, flag, default, meaning)
    _settings(trim, "MODEL | key.sub=value", MODEL_WORDS)
    _shortcuts(trim, "trim")
    for name, meaning in STAGES.items():
        stage = commands.add_parser(
            name, help=meaning, description=_sentence(meaning), epilog=describe(STAGE_SECTIONS[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        _settings(stage)
        _shortcuts(stage, name)
        if name == "prune":
            _dry_run(stage)
    submit = commands.add_parser("submit", help=SUBMIT, description=_sentence(SUBMIT))
    for flag, meaning in SUBMIT_FLAGS.items():
        submit.add_argument(flag, metavar="X", help=meaning)
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch commands only")
    submit.add_argument("--example", action="store_true", help="print a cluster file to edit, and nothing else")
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file")
    status = commands.add_parser("status", help=STATUS, description=_sentence(STATUS))
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--tsv", action="store_true", help="print stage, state and job between tabs")
    _settings(status, file="YAML file of the run, instead of its directory")
    return top


def _settings(
    command: argparse.ArgumentParser, words: str = "RUN | key.sub=value", meaning: str = OVERRIDES,
    file: str = "YAML file with the run's settings",
) -> None:  # fmt: skip
    command.add_argument("--config", help=file)
    overrides = command.add_argument("overrides", nargs="*", metavar=words, help=meaning)
    overrides.completer = complete  # type: ignore[attr-defined]  # argcomplete's


def complete(prefix: str, **_) -> list[str]:
    """Settings and directories that begin like a word, for the completion of a shell."""
    from argcomplete.completers import DirectoriesCompleter

    from nuteprune.config import flatten, load_config, to_dict

    return [f"{key}=" for key in flatten(to_dict(load_config(None)))] + list(DirectoriesCompleter()(prefix))


def _shortcuts(command: argparse.ArgumentParser, stage: str) -> None:
    for flag, key in SHORTCUTS.get(stage, {}).items():
        command.add_argument(flag, metavar="X", help=f"same as {key}=X")


def _plan(command: argparse.ArgumentParser) -> None:
    for flag, (default, meaning) in PLAN_FLAGS.items():
        _with_default(command, flag, default, meaning)
    command.add_argument("--zero", choices=("auto", "2", "3"), default="auto", help="ZeRO stage (auto: the faster)")
    command.add_argument("--verbose", action="store_true", help="all figures, other layouts and what is assumed")
    command.add_argument("--json", action="store_true", help="print JSON")
    _settings(command, "MODEL | key.sub=value", f"{PLANNED}; directory of a run; settings")
    _shortcuts(command, "plan")


def _dry_run(command: argparse.ArgumentParser) -> None:
    command.set_defaults(**{flag.strip("-").replace("-", "_"): default for flag, (default, _) in PLAN_FLAGS.items()})
    command.add_argument("--dry-run", action="store_true", help="build the run without weights and print its plan")
    for flag in DRY_RUN_FLAGS:
        default, meaning = PLAN_FLAGS.get(flag, (1, "ranks"))
        _with_default(command, flag, default, f"of a dry run: {meaning}")


def _with_default(command: argparse.ArgumentParser, flag: str, default: str | float, meaning: str) -> None:
    meaning += f" (default {default})" if default else ""
    command.add_argument(flag, type=type(default), default=default, metavar="X", help=meaning)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
