"""Command line: `nuteprune STAGE --config x.yaml [key.sub=value …]`, also as `python -m nuteprune`."""

from __future__ import annotations

import argparse
import atexit
import errno
import importlib
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from nuteprune.config import STAGE_SECTIONS, Config, ConfigError, describe, load_config
from nuteprune.runs.words import plain
from nuteprune.training.memory import TooLarge, is_out_of_memory
from nuteprune.training.signals import Preempted, stop_signals

STAGES = {
    "prepare": "fetch the model, tokenise and pack the text, once and without a GPU",
    "prune": "learn gates and LoRA on the frozen base model, taught by earlier snapshots of the student",
    "recover": "train snapshots of a run on, their gates fixed, so that each rung of a ladder is worth its size",
    "finetune": "train the pruned student's LoRA on instruction records, its gates fixed",
    "export": "write the student (or a snapshot of the run, or a ladder of them) as a small Hugging Face model",
    "evaluate": "perplexity, speed and tasks of models side by side, as JSON and Markdown",
}
RUN = "all stages one after the other on this machine, with settings chosen for it; goes on where it stopped"
SHORTCUTS = {
    "run": {
        "--sparsity": "sparsity.target",
        "--data": "data.source",
        "--out": "run_dir",
        "--gguf": "export.gguf",
    },
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
    "--sweep": "instead, prune, export and evaluate once for each entry of a YAML list of settings, as a job array",
}
"""Flags of `submit` that take a value; slurm/submit.sh reads them."""
STATUS = "how far a run is: stages, steps, speed, SLURM jobs and the first error of a failed one"
DISTRIBUTED = ("prune", "recover", "finetune")
"""Stages that several ranks run together."""
OVERRIDES = "directory of a run (for --config RUN/config.yaml), and settings that win over the file"
PLAN = "memory, traffic, time and settings of a prune run on a cluster, from config.json alone"
PLAN_FLAGS = {
    "--model": ("", "directory, config.json, hub id, or a name such as llama-3.1-70b (default: model.path)"),
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
    "--out": ("", "directory for plan.yaml and deepspeed.json"),
}
"""Flags of `plan`: default and meaning."""
DRY_RUN_FLAGS = ("--world-size", "--gpus-per-node", "--gpu", "--gpu-memory")


OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
OUT_OF_MEMORY = {
    "prune": "set model.dtype=bfloat16, lower data.seq_len, set train.activation_checkpointing=true, or share the "
    "weights out with deepspeed=zero3 (`nuteprune plan` says what fits)",
    "recover": "share the weights out with deepspeed=zero3",
    "finetune": "lower finetune.seq_len, set train.activation_checkpointing=true, or share the weights out with "
    "deepspeed=zero3",
    "export": "it folds on the CPU in float32: lower export.check_tokens, or export on a machine with more memory",
    "evaluate": "lower evaluate.window or evaluate.batch_sizes, or set model.dtype=bfloat16; what was measured is in "
    "report.json",
}
"""What a stage that ran out of memory can do about it."""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="nuteprune", description="Structured pruning with numerous teachers.")
    # The deepspeed launcher adds it; the variable LOCAL_RANK says the same.
    top.add_argument("--local_rank", help=argparse.SUPPRESS)
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    whole = stages.add_parser("run", help=RUN, description=RUN.capitalize() + ".")
    whole.add_argument("--config", help="YAML file with the run's settings, such as the run.yaml of an earlier start")
    for flag, key in SHORTCUTS["run"].items():
        whole.add_argument(flag, metavar="X", help=f"same as {key}=X")
    whole.add_argument("overrides", nargs="*", metavar="MODEL | key.sub=value",
                       help="directory or hub id of the model (for model.path=MODEL), and settings")  # fmt: skip
    for name, meaning in STAGES.items():
        sub = stages.add_parser(
            name, help=meaning, description=meaning.capitalize() + ".",
            epilog="fields:\n" + describe(STAGE_SECTIONS[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--config", help="YAML file with the run's settings")
        for flag, key in SHORTCUTS.get(name, {}).items():
            sub.add_argument(flag, metavar="X", help=f"same as {key}=X")
        if name == "prune":
            sub.add_argument("--dry-run", action="store_true", help="build the run without weights and print its plan")
            for flag in DRY_RUN_FLAGS:
                default, meaning = PLAN_FLAGS.get(flag, (1, "ranks"))
                meaning += f" (default {default})" if default else ""
                sub.add_argument(flag, type=type(default), default=default, metavar="X",
                                 help=f"of a dry run: {meaning}")  # fmt: skip
        sub.add_argument("overrides", nargs="*", metavar="RUN | key.sub=value", help=OVERRIDES)
    submission = stages.add_parser("submit", help=SUBMIT, description=SUBMIT.capitalize() + ".")
    for flag, meaning in SUBMIT_FLAGS.items():
        submission.add_argument(flag, metavar="X", help=meaning)
    submission.add_argument("--dry-run", action="store_true", help="print the sbatch commands only")
    submission.add_argument("--example", action="store_true", help="print a cluster file to edit, and nothing else")
    submission.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file")
    status = stages.add_parser("status", help=STATUS, description=STATUS.capitalize() + ".")
    status.add_argument("--config", help="YAML file of the run, instead of its directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--tsv", action="store_true", help="print stage, state and job between tabs")
    status.add_argument("overrides", nargs="*", metavar="RUN | key.sub=value", help=OVERRIDES)
    plan = stages.add_parser("plan", help=PLAN, description=PLAN.capitalize() + ".")
    for flag, (default, meaning) in PLAN_FLAGS.items():
        meaning += f" (default {default})" if default else ""
        plan.add_argument(flag, type=type(default), default=default, metavar="X", help=meaning)
    plan.add_argument("--zero", choices=("auto", "2", "3"), default="auto", help="ZeRO stage (auto: the faster)")
    plan.add_argument(
        "--table", action="store_true", help="well-known models on one card, a node and two, at 20%% and 50%%"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--config", help="YAML file with the run's settings")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 1 (failed run), 2 (a user's mistake) or 75 (preempted, saved).

    Of several ranks the first speaks for all; only a rank that lost another says so itself.
    """
    words = sys.argv[1:] if argv is None else argv
    args, rest = parser().parse_known_args(words)
    if any(word.startswith("-") for word in rest):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides += rest  # settings may stand before and behind --config
    if args.stage == "submit":
        return submit(words[1:], args.example)
    if args.stage == "status":
        return show_status(args)
    try:
        # Before anything that takes time: a job may be told to leave while it loads.
        with stop_signals() if args.stage in (*DISTRIBUTED, "run") else nullcontext():
            return run(args)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"nuteprune: {stop}\n")
        return stop.exit_code


def run(args: argparse.Namespace) -> int:
    """`main` from a parsed command line of any stage but status."""
    quiet_libraries()
    from nuteprune.parallel.distributed import RankLost, discover

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        world = discover(computes=args.stage in (*DISTRIBUTED, "evaluate") and not getattr(args, "dry_run", False))
        is_main = world.is_main
        if not is_main:
            logging.getLogger("nuteprune").setLevel(logging.ERROR)
        if world.size > 1 and args.stage not in DISTRIBUTED:
            raise ConfigError(f"{args.stage} runs in one process, not in {world.size}: start it without a launcher")
        config = read_settings(args)
        if getattr(args, "dry_run", False):
            sys.stdout.write(dry_run(config, args) + "\n")
            return 0
        if args.stage == "plan":
            from nuteprune.stages import plan

            typed = args.config is not None or any(o.startswith("model.dtype=") for o in args.overrides)
            outcome = plan.run(config, args, typed)
            sys.stdout.write(outcome.text + "\n")
            return 0 if outcome.fits else 1
        text = run_chain(config) if args.stage == "run" else run_stage(args.stage, config)
        if is_main:
            sys.stdout.write(plain(text) + "\n")
    except ConfigError as error:
        if is_main:
            sys.stderr.write(f"nuteprune: {plain(str(error))}\n")
        return 2
    except OSError as error:
        if error.errno not in OF_THE_DISK or not error.filename:
            raise
        told = f"{error.filename}: {error.strerror}; mend that or free space, and start the same command again"
        sys.stderr.write(f"nuteprune: {plain(told)}\n")
        return 2
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            place = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
            told = (str(error).strip().splitlines() or ["MemoryError"])[0][:200]
            sys.stderr.write(f"nuteprune: {place}out of memory ({told}): {OUT_OF_MEMORY.get(args.stage, 'use more')}\n")
            return 1
        if not type(error).__module__.startswith("nuteprune."):
            raise
        if is_main or isinstance(error, (RankLost, TooLarge)):
            sys.stderr.write(f"nuteprune: {plain(str(error))}\n")
        return getattr(error, "exit_code", 1)
    return 0


def dry_run(config: Config, args: argparse.Namespace) -> str:
    """What a dry run of the prune stage found, and the planner's figures for it."""
    from nuteprune.planning import dryrun
    from nuteprune.stages import plan

    ranks, per_node = args.world_size, min(args.world_size, args.gpus_per_node)
    if ranks < 1 or per_node < 1 or ranks % per_node:
        raise ConfigError(f"--world-size {ranks} is not made of whole nodes of {args.gpus_per_node} GPUs")
    flags = {flag.strip("-").replace("-", "_"): default for flag, (default, _) in PLAN_FLAGS.items()}
    flags |= {"nodes": ranks // per_node, "gpus_per_node": per_node, "gpu": args.gpu, "gpu_memory": args.gpu_memory}
    found = dryrun.text(dryrun.dry_run(config, ranks, per_node), config)
    return f"{found}\n\n{plan.figures(config, argparse.Namespace(**flags))}"


def submit(words: list[str], example: bool) -> int:
    """Run slurm/submit.sh with these arguments, with this Python on the nodes unless the cluster file names another."""
    folder = Path(__file__).parent / "slurm"
    if example:
        sys.stdout.write((folder / "clusters" / "example.env").read_text(encoding="utf-8"))
        return 0
    environment = {"PYTHON": sys.executable, **os.environ}
    return subprocess.run(["bash", str(folder / "submit.sh"), *words], env=environment, check=False).returncode


def show_status(args: argparse.Namespace) -> int:
    """Print how far a run is; returns the exit code. Imports neither torch nor transformers: it answers at once."""
    from nuteprune.stages import status

    # A run that has not started yet has no config.yaml: its directory is named like a setting.
    args.overrides = [o if "=" in o or os.path.isfile(f"{o}/config.yaml") else f"run_dir={o}" for o in args.overrides]
    try:
        found = status.run(read_settings(args))
    except ConfigError as error:
        sys.stderr.write(f"nuteprune: {plain(str(error))}\n")
        return 2
    sys.stdout.write(plain(status.table(found) if args.tsv else json.dumps(found, indent=2) if args.json else
                           status.text(found)) + "\n")  # fmt: skip
    return 0


def read_settings(args: argparse.Namespace) -> Config:
    """The configuration of a parsed command line."""
    if args.stage == "run":
        args.overrides = [word if "=" in word else f"model.path={word}" for word in args.overrides]
    runs = [word for word in args.overrides if "=" not in word and os.path.isdir(word)]
    if len(runs) + (args.config is not None) > 1:
        raise ConfigError("give one run directory or one --config")
    overrides = [word for word in args.overrides if word not in runs]
    for flag, key in SHORTCUTS.get(args.stage, {}).items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}=[{value}]" if key.endswith("ladder") else f"{key}={value}")
    return load_config(runs[0] if runs else args.config, overrides)


def run_chain(config: Config) -> str:
    """Run all stages; returns what the command line prints at the end."""
    from nuteprune import chain

    return chain.run(config)


def run_stage(name: str, config: Config) -> str:
    """Run a stage; returns what the command line prints at its end."""
    # Imported here, so that --help answers at once.
    from nuteprune import api

    result = getattr(api, name)(config)
    return importlib.import_module(f"nuteprune.stages.{name}").summary(config, result)


def cli() -> NoReturn:
    """`main` as a process.

    One rank of several ends without the interpreter's finalization. After a failure destructors could wait for ranks
    that are gone. After success DeepSpeed still refers to the process groups, so their threads are not joined, and one
    that lets go of a tensor during finalization aborts the process ("terminate called without an active exception").
    """
    try:
        code = main()
    except Exception:  # whatever it is: printed here, since os._exit below would swallow it
        traceback.print_exc()
        code = 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if not code:
            atexit._run_exitfuncs()
            if "mpi4py.MPI" in sys.modules:  # its own hook comes later, and mpirun takes a rank without it for failed
                sys.modules["mpi4py.MPI"].Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class PlainFormatter(logging.Formatter):
    """Names of files and models in a log cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return plain(super().format(record))


def quiet_libraries() -> None:
    """Our own log on stderr; of the libraries only warnings and worse."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("nuteprune").setLevel(logging.INFO)
    # DeepSpeed calls a name that torch has renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here, so that --help answers at once.
    import torch
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.enable_progress_bars()  # which that switched off too; they show on a terminal only
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which transformers imports, warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


if __name__ == "__main__":
    # `python -m` puts the current directory first: a user's own kernels.py there is not the package transformers means.
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
    cli()
