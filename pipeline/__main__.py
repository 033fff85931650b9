"""Command line: `nuteprune STAGE --config x.yaml [key.sub=value …]`, also as `python -m nuteprune`."""

from __future__ import annotations

import argparse
import atexit
import errno
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from nuteprune import api
from nuteprune.config import check_said, given_keys, load_config
from nuteprune.errors import MachineError, UserError, first_line
from nuteprune.flags import DISTRIBUTED, SHORTCUTS, parser
from nuteprune.runs.log import hush, start_log
from nuteprune.runs.words import plain
from nuteprune.training.memory import TooLarge, is_out_of_memory
from nuteprune.training.signals import Preempted, stop_signals

BLAMED = "a fault of this machine, not of the settings: "
OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
OUT_OF_MEMORY = {
    "prune": "set model.dtype=bfloat16, lower data.seq_len, set train.activation_checkpointing=true, or share the "
    "weights out with deepspeed=zero3 (`nuteprune plan` says what fits)",
    "recover": "share the weights out with deepspeed=zero3",
    "finetune": "lower finetune.seq_len, set train.activation_checkpointing=true, or share the weights out with "
    "deepspeed=zero3",
    "distill": "set model.dtype=bfloat16 or train.activation_checkpointing=true, or share both models out over more "
    "ranks with deepspeed=zero3",
    "export": "it folds on the CPU in float32: export on a machine with more memory",
    "evaluate": "lower evaluate.window or evaluate.batch_sizes, or set model.dtype=bfloat16; what was measured is in "
    "report.json",
}
"""What a stage that ran out of memory can do about it."""


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 1 (failed run), 2 (a user's mistake) or 75 (told to stop).

    Of several ranks the first speaks for all; only a rank that lost another says so itself.
    """
    words, known = sys.argv[1:] if argv is None else argv, parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(known)
    args, rest = known.parse_known_args(words)
    if any(word.startswith("-") for word in rest):
        known.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides += rest  # settings may stand before and behind --config
    if args.stage == "submit":
        return submit(words[1:], args.example)
    if args.stage == "status":
        return show_status(args)
    try:
        with stop_signals():  # before anything that takes time: a job may be told to leave while it loads
            return run(args)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"nuteprune: {stop}\n")
        return stop.exit_code


def run(args: argparse.Namespace) -> int:
    """`main` from a parsed command line of any stage but submit and status."""
    start_log()
    rank = os.environ.get("RANK", "0")
    is_main = rank == "0" or not rank.isdecimal()
    dry, several = getattr(args, "dry_run", False), api.several_ranks()
    try:
        if several:  # before anything that may be wrong: the first one tells it
            is_main = join(args.stage)
        source, overrides = settings_of(args)
        config, given = load_config(source, overrides), given_keys(source, overrides)
        check_said(args.stage, config, overrides)
        if not dry:  # which knows sizes of models that are not here
            api.check_at_once(args.stage, config)
        if args.stage == "plan":
            args.config = source
            text, fits = api.module("stages.plan").run(config, args, given)
            sys.stdout.write(text + "\n")
            return 0 if fits else 1
        hush()
        if not several:
            join(args.stage, computes=args.stage in (*DISTRIBUTED, "evaluate") and not dry)
        if dry:
            text = api.module("stages.plan").dry_run(config, args)
        elif args.stage == "trim":
            text = api.module("stages.trim").run(config, args.out, args.tokens)
        elif args.stage == "run":
            config, report = api.module("chain").run(config, given)
            text = api.module("stages.evaluate").summary(config, report)
        else:
            stage = api.module(f"stages.{args.stage}")
            text = stage.summary(config, stage.run(config))
        if is_main:
            sys.stdout.write(plain(text) + "\n")
    except UserError as error:
        if is_main:
            sys.stderr.write(f"nuteprune: {BLAMED * isinstance(error, MachineError)}{plain(str(error))}\n")
        return 2
    except OSError as error:
        if error.errno not in OF_THE_DISK or not error.filename:
            raise
        told = f"{error.filename}: {error.strerror}; mend that or free space, and start the same command again"
        sys.stderr.write(f"nuteprune: {BLAMED}{plain(told)}\n")
        return 2
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            place = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
            advice = OUT_OF_MEMORY.get(args.stage, "use more")
            sys.stderr.write(f"nuteprune: {place}out of memory ({first_line(error)}): {advice}\n")
            return 1
        if not type(error).__module__.startswith("nuteprune."):
            raise
        if is_main or isinstance(error, TooLarge) or type(error).__name__ == "RankLost":
            sys.stderr.write(f"nuteprune: {plain(str(error))}\n")
        return getattr(error, "exit_code", 1)
    return 0


def join(stage: str, computes: bool = True) -> bool:
    """Find this process among the ranks of its launcher; returns whether it is the one that speaks."""
    hush()
    from nuteprune.parallel.distributed import discover

    world = discover(computes)
    if not world.is_main:
        logging.getLogger("nuteprune").setLevel(logging.ERROR)
    if world.size > 1 and stage not in DISTRIBUTED:
        raise UserError(f"{stage} runs in one process, not in {world.size}: start it without a launcher")
    return world.is_main


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

    lost = [word for word in args.overrides if not is_setting(word) and not os.path.isdir(word)]
    # A run that has not started yet has no config.yaml: its directory is named like a setting.
    args.overrides = [
        word if is_setting(word) or os.path.isfile(f"{word}/config.yaml") else f"run_dir={word}"
        for word in args.overrides
    ]
    try:
        if lost:
            raise UserError(f"no directory {lost[0]}: give that of a run, which it has from its first start on")
        found = status.run(load_config(*settings_of(args)))
    except UserError as error:
        sys.stderr.write(f"nuteprune: {plain(str(error))}\n")
        return 2
    sys.stdout.write(plain(status.table(found) if args.tsv else json.dumps(found, indent=2) if args.json else
                           status.text(found)) + "\n")  # fmt: skip
    return 0


def settings_of(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """A configuration's file or directory and its overrides, as a parsed command line has them."""
    if args.stage in ("run", "trim", "plan"):
        models = [word for word in args.overrides if not is_setting(word)]
        if args.stage == "plan":
            models = [word for word in models if not os.path.isfile(os.path.join(word, "config.yaml"))]
        if len(models) > 1:
            raise UserError(f"give one model: {' and '.join(models)} are {len(models)}")
        args.overrides = [f"model.path={word}" if word in models else word for word in args.overrides]
    runs = [word for word in args.overrides if not is_setting(word) and os.path.isdir(word)]
    if len(runs) + (args.config is not None) > 1:
        raise UserError("give one run directory or one --config")
    overrides = [word for word in args.overrides if word not in runs]
    for flag, key in SHORTCUTS.get(args.stage, {}).items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}=[{value}]" if key.endswith("ladder") else f"{key}={value}")
    return runs[0] if runs else args.config, overrides


def is_setting(word: str) -> bool:
    """Whether a word is `key.sub=value`: a path may have an = too, as those of a sweep's runs have."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key


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


if __name__ == "__main__":
    # `python -m` puts the current directory first: a user's own kernels.py there is not the package transformers means.
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
    cli()
