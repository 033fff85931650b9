"""Command line: `nuteprune STAGE --config x.yaml [key.sub=value …]`, also as `python -m pipeline`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from pipeline.config import STAGE_SECTIONS, ConfigError, describe, load_config

STAGES = {
    "prune": "learn gates and LoRA on the frozen base model, taught by earlier snapshots of the student",
    "export": "write the pruned student (or a snapshot of the run) as a small Hugging Face model",
    "evaluate": "perplexity, speed and tasks of models side by side, as JSON and Markdown",
}
SHORTCUTS = {"export": {"--sparsity": "export.sparsity"}, "evaluate": {"--blocks": "evaluate.blocks"}}
"""Flags of a stage that stand for one key."""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="nuteprune", description="Structured pruning with numerous teachers.")
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, meaning in STAGES.items():
        sub = stages.add_parser(
            name, help=meaning, description=meaning.capitalize() + ".",
            epilog="fields:\n" + describe(STAGE_SECTIONS[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--config", help="YAML file with the run's settings")
        for flag, key in SHORTCUTS.get(name, {}).items():
            sub.add_argument(flag, metavar="X", help=f"same as {key}=X")
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 1 (failed run), 2 (a user's mistake) or 75 (preempted, saved)."""
    args, rest = parser().parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides += rest  # settings may stand before and behind --config
    quiet_libraries()
    overrides = list(args.overrides)
    for flag, key in SHORTCUTS.get(args.stage, {}).items():
        value = getattr(args, flag.strip("-"))
        if value is not None:
            overrides.append(f"{key}={value}")
    try:
        config = load_config(args.config, overrides)
        stage = importlib.import_module(f"pipeline.stages.{args.stage}")
        sys.stdout.write(stage.summary(config, stage.run(config)) + "\n")
    except ConfigError as error:
        sys.stderr.write(f"nuteprune: {error}\n")
        return 2
    except RuntimeError as error:
        if type(error).__module__.startswith("pipeline."):
            sys.stderr.write(f"nuteprune: {error}\n")
            return getattr(error, "exit_code", 1)
        raise
    return 0


def quiet_libraries() -> None:
    """Our own log on stderr; of the libraries only warnings and worse."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here, so that --help answers at once.
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which transformers imports, warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


if __name__ == "__main__":
    sys.exit(main())
