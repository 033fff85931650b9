"""The plan command: memory, traffic and time of a run on a cluster from config.json alone, and the settings for it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from nuteprune.config import Config, Dtype
from nuteprune.errors import MachineError, UserError
from nuteprune.planning.cards import CARDS, UNNAMED, Card, card_named, quantity
from nuteprune.planning.job import Cluster, Job
from nuteprune.planning.machine import Machine, choose
from nuteprune.planning.models import MODELS, read_model
from nuteprune.planning.planner import Plan, deepspeed_settings, make_plan, run_settings
from nuteprune.planning.report import as_dict, figures_of, plan_text


def run(config: Config, args: argparse.Namespace, given: Collection[str] = ()) -> tuple[str, bool]:
    """Plan the run that the flags and the configuration describe; writes its files into `--out` (`settings_files`).

    Without a file, a run's directory or a recipe, and without a number of steps, it is the run that `nuteprune run`
    would choose on those cards.

    Args:
        config: the run's configuration.
        args: the flags of `nuteprune plan`.
        given: keys of the settings that are the user's choice.

    Returns:
        What the command prints, and whether the run fits.

    Raises:
        UserError: a flag, the model or the configuration is wrong.
    """
    cluster = read_cluster(args)
    if not 0 < args.tokens_per_document < math.inf:
        raise UserError(f"--tokens-per-document {args.tokens_per_document:g}: must be a number greater than 0")
    model, spec = read_model(config.model.path)
    whole = (
        not args.config and args.zero == "auto" and not {"recipe", "train.steps", "train.epochs"}.intersection(given)
    )
    if whole:
        machine = Machine(cluster.card.name, cluster.ranks, cluster.card, bf16=True)
        choices, plan = choose(config, given, machine, spec, cluster)
        left_out = [
            f"distill: {choice.why}" for choice in choices if choice.key == "distill.steps" and not choice.value
        ]
    else:
        named = str(getattr(model, "dtype", None)).removeprefix("torch.")
        dtype: Dtype | None = next((known for known in get_args(Dtype) if known == named), None)
        if "model.dtype" not in given and dtype is not None:
            config = replace(config, model=replace(config.model, dtype=dtype))
        plan, left_out = make_plan(Job(spec, config, cluster, args.tokens_per_document), args.zero), []
    assert plan is not None
    out = Path(args.out) if args.out else None
    files = settings_files(plan, out)
    if out:
        write(files, out)
    if args.json:
        return json.dumps(as_dict(plan, placed(plan, out)), indent=2), plan.fits
    return plan_text(plan, files, args.verbose, left_out), plan.fits


def read_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster of the flags; raises `UserError` for a count below one, an unknown unit or a share out of range."""
    for flag, count in (("--nodes", args.nodes), ("--gpus-per-node", args.gpus_per_node)):
        if count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must be above 0 and at most 1 (the share of the peak that is reached)")
    disk = quantity("--disk-bandwidth", args.disk_bandwidth, "rate")
    return Cluster(args.nodes, args.gpus_per_node, read_card(args), args.mfu, disk)


def read_card(args: argparse.Namespace) -> Card:
    """The card of the flags: a named one, else an H100, or `UNNAMED` where only its memory is told; what is told of it
    by other flags wins."""
    card = card_named(args.gpu) if args.gpu else UNNAMED if args.gpu_memory else CARDS["h100"]
    if not args.gpu and args.gpu_memory:
        card = replace(card, name=f"{card.name} (no --gpu was given: the slowest known)")
    told: dict[str, Any] = {
        "memory": quantity("--gpu-memory", args.gpu_memory, "bytes") if args.gpu_memory else None,
        "link": quantity("--intra-bandwidth", args.intra_bandwidth, "rate") if args.intra_bandwidth else None,
        "nic": quantity("--inter-bandwidth", args.inter_bandwidth, "rate") if args.inter_bandwidth else None,
        "host": quantity("--host-bandwidth", args.host_bandwidth, "rate") if args.host_bandwidth else None,
    }
    if args.flops:
        told["flops"] = told["single"] = quantity("--flops", args.flops, "flops")
    return replace(card, **{field: value for field, value in told.items() if value is not None})


def placed(plan: Plan, out: Path | None) -> dict[str, str]:
    """Paths of the stages' DeepSpeed files, of those that have one: two where their layouts differ."""
    zeros = {stage.name: deepspeed_settings(stage.chosen.layout) for stage in plan.stages if stage.chosen.layout.stage}
    names = {
        name: "deepspeed.json" if zero == zeros.get("prune") else f"{name}-deepspeed.json"
        for name, zero in zeros.items()
    }
    return {name: str(out / file) if out else file for name, file in names.items()}


def settings_files(plan: Plan, out: Path | None) -> dict[str, str]:
    """Text of plan.yaml and of the DeepSpeed files, by name."""
    cluster, paths = plan.job.cluster, placed(plan, out)
    launch = f"deepspeed --num_nodes {cluster.nodes} --num_gpus {cluster.gpus_per_node} --module nuteprune prune"
    head = f"# {launch if 'prune' in paths else 'nuteprune prune'} --config plan.yaml\n"
    if plan.job.config.model.path.lower() in MODELS:
        head += "# model.path is a name of the planner: set it to the model's directory or hub id\n"
    files = {"plan.yaml": head + yaml.safe_dump(run_settings(plan, paths), sort_keys=False)}
    for stage in plan.stages:
        if stage.name in paths:
            text = json.dumps(deepspeed_settings(stage.chosen.layout), indent=2) + "\n"
            files[Path(paths[stage.name]).name] = text
    return files


def write(files: dict[str, str], out: Path) -> None:
    """Write the files into `out`, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"--out {out}: cannot write there ({error.strerror})") from None


def dry_run(config: Config, args: argparse.Namespace) -> str:
    """What a dry run of the prune stage found, and the planner's figures for it; the flags are those of `plan` too."""
    ranks, per_node = args.world_size, min(args.world_size, args.gpus_per_node)
    if ranks < 1 or per_node < 1 or ranks % per_node:
        raise UserError(f"--world-size {ranks} is not made of whole nodes of {args.gpus_per_node} GPUs")
    from nuteprune.planning import dryrun  # a plan needs none of what builds a model

    args.nodes, args.gpus_per_node = ranks // per_node, per_node
    found = dryrun.text(dryrun.dry_run(config, ranks, per_node), config)
    return f"{found}\n\n{figures(config, args)}"


def figures(config: Config, args: argparse.Namespace) -> str:
    """Memory, traffic and time of a run as the flags of `nuteprune plan` describe its cluster."""
    plan = make_plan(Job(read_model(config.model.path)[1], config, read_cluster(args), args.tokens_per_document))
    return "\n\n".join(figures_of(plan))
