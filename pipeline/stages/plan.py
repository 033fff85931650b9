"""The plan command: memory, traffic and time of a run on a cluster from config.json alone, and the settings for it."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import yaml

from nuteprune.config import Config, ConfigError, Dtype
from nuteprune.parallel.sizes import read_parameters, total_parameters
from nuteprune.planning.bill import checkpoint_bytes
from nuteprune.planning.cards import CARDS, UNNAMED, Card, card_named, quantity
from nuteprune.planning.costs import ASSUMPTIONS, passes, traffic
from nuteprune.planning.footprint import USABLE
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.planning.models import MODELS, read_model
from nuteprune.planning.planner import (
    HOST_LIMIT,
    LIMIT,
    TARGETS,
    Estimate,
    Plan,
    deepspeed_settings,
    make_plan,
    run_settings,
    table,
)

GB = 1e9


@dataclass(frozen=True)
class Outcome:
    """What the command prints, and whether the run fits."""

    text: str
    fits: bool


def run(config: Config, args: argparse.Namespace, dtype_given: bool = True) -> Outcome:
    """Plan the run that the flags and the configuration describe; writes plan.yaml, deepspeed.json into `--out`.

    Args:
        config: the run's configuration.
        args: the flags of `nuteprune plan`.
        dtype_given: `model.dtype` is the user's choice; else the type named in config.json is taken where it has one.

    Raises:
        ConfigError: a flag, the model or the configuration is wrong.
    """
    cluster = read_cluster(args)
    if args.tokens_per_document <= 0:
        raise ConfigError(f"--tokens-per-document {args.tokens_per_document:g}: must be greater than 0")
    if args.table:
        rows = table(config, cluster, args.tokens_per_document, args.zero)
        plans = [as_dict(plan) for row in rows for plan in row]
        return Outcome(json.dumps(plans, indent=2) if args.json else table_text(rows), True)
    model, spec = read_model(args.model or config.model.path)
    named = str(getattr(model, "dtype", None)).removeprefix("torch.")
    dtype: Dtype | None = next((known for known in get_args(Dtype) if known == named), None)
    if not dtype_given and dtype is not None:
        config = replace(config, model=replace(config.model, dtype=dtype))
    if args.model:
        config = replace(config, model=replace(config.model, path=args.model))
    plan = make_plan(Job(spec, config, cluster, args.tokens_per_document), args.zero)
    files = settings_files(plan, Path(args.out) if args.out else None)
    if args.out:
        write(files, Path(args.out))
    return Outcome(json.dumps(as_dict(plan), indent=2) if args.json else plan_text(plan, files), plan.chosen.fits)


def read_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster of the flags; raises `ConfigError` for a count below one, an unknown unit or a share out of range."""
    for flag, count in (("--nodes", args.nodes), ("--gpus-per-node", args.gpus_per_node)):
        if count < 1:
            raise ConfigError(f"{flag} {count}: must be at least 1")
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu:g}: must be above 0 and at most 1 (the share of the peak that is reached)")
    disk = quantity("--disk-bandwidth", args.disk_bandwidth, "rate")
    return Cluster(args.nodes, args.gpus_per_node, read_card(args), args.mfu, disk)


def read_card(args: argparse.Namespace) -> Card:
    """The card of the flags: a named one, else an H100, or `UNNAMED` where only its memory is told; what is told of it
    by other flags wins."""
    card = card_named(args.gpu) if args.gpu else UNNAMED if args.gpu_memory else CARDS["h100"]
    if not args.gpu and args.gpu_memory:
        card = replace(card, name=f"{card.name} (no --gpu was given: the slowest known)")
    told = {
        "memory": quantity("--gpu-memory", args.gpu_memory, "bytes") if args.gpu_memory else None,
        "link": quantity("--intra-bandwidth", args.intra_bandwidth, "rate") if args.intra_bandwidth else None,
        "nic": quantity("--inter-bandwidth", args.inter_bandwidth, "rate") if args.inter_bandwidth else None,
        "host": quantity("--host-bandwidth", args.host_bandwidth, "rate") if args.host_bandwidth else None,
    }
    if args.flops:
        told["flops"] = told["single"] = quantity("--flops", args.flops, "flops")
    return replace(card, **{field: value for field, value in told.items() if value is not None})


def settings_files(plan: Plan, out: Path | None) -> dict[str, str]:
    """Text of plan.yaml, and of deepspeed.json where the layout has one, by name."""
    cluster, zero = plan.job.cluster, plan.chosen.layout.stage
    deepspeed = str(out / "deepspeed.json") if out else "deepspeed.json"
    launch = f"deepspeed --num_nodes {cluster.nodes} --num_gpus {cluster.gpus_per_node} --module nuteprune prune"
    head = f"# {launch if zero else 'nuteprune prune'} --config plan.yaml\n"
    head += f"# DeepSpeed settings: {deepspeed}\n" if zero else ""
    if plan.job.config.model.path.lower() in MODELS:
        head += "# model.path is a name of the planner: set it to the model's directory or hub id\n"
    files = {"plan.yaml": head + yaml.safe_dump(run_settings(plan, deepspeed), sort_keys=False)}
    return files | ({"deepspeed.json": json.dumps(deepspeed_settings(plan), indent=2) + "\n"} if zero else {})


def write(files: dict[str, str], out: Path) -> None:
    """Write the files into `out`, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot write there ({error.strerror})") from None


def figures(config: Config, args: argparse.Namespace) -> str:
    """Memory, traffic and time of a run as the flags of `nuteprune plan` describe its cluster."""
    plan = make_plan(Job(read_model(config.model.path)[1], config, read_cluster(args), args.tokens_per_document))
    return "\n\n".join(figures_of(plan))


def figures_of(plan: Plan) -> list[str]:
    """The paragraphs of a plan."""
    job, chosen = plan.job, plan.chosen
    return [headline(plan), bill_text(plan), memory_text(job, chosen), traffic_text(job, chosen), time_text(plan)]


def plan_text(plan: Plan, files: dict[str, str]) -> str:
    """The whole plan, as printed."""
    blocks = [
        *figures_of(plan),
        choice_text(plan),
        "\n".join(f"--- {name} ---\n{text.rstrip()}" for name, text in files.items()),
        "assumptions\n" + "\n".join(f"  - {line}" for line in ASSUMPTIONS),
    ]
    return "\n\n".join(blocks)


def headline(plan: Plan) -> str:
    """Model, cluster, batch and layout in four lines."""
    spec, cluster, config, count = plan.job.spec, plan.job.cluster, plan.job.config, total_parameters(plan.job.spec)
    experts = f" in {spec.top_k} of {spec.experts} experts" if spec.experts > 1 else ""
    experts += f" ({read_parameters(spec):,} parameters read for a token)" if experts else ""
    return (
        f"{config.model.path}: {count:,} parameters, {count * plan.job.itemsize / GB:.1f} GB in {config.model.dtype} "
        f"({spec.layers} layers, hidden {spec.hidden}, {spec.heads} heads, {spec.kv_heads} KV, ffn {spec.ffn}"
        f"{experts}, vocabulary {spec.vocab}{' tied' if spec.tied else ''})\n"
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.card.memory / GB:.1f} GB, {cluster.card.name}\n"
        f"batch {config.train.batch_size} x {config.data.seq_len} tokens, {plan.job.local_batch} sequences a rank; "
        f"target {config.sparsity.target:.0%}\n"
        f"layout: {layout_text(plan.job, plan.chosen.layout)}"
        f"{'' if plan.chosen.fits else '  ** DOES NOT FIT **'}"
    )


def layout_text(job: Job, layout: Layout) -> str:
    """A layout in one line."""
    options = [("checkpointing", layout.checkpointing), ("offload", layout.offload), ("hpZ", layout.hpz)]
    stage = f"ZeRO-{layout.stage}, " if layout.stage else ""
    size = f"{stage}micro-batch {layout.micro_batch} ({passes(job, layout)} a step)"
    return ", ".join([size, *(name for name, on in options if on)])


def memory_text(job: Job, chosen: Estimate) -> str:
    """Memory of a rank by part, in GB."""
    need = chosen.memory
    usable = USABLE * job.cluster.card.memory / GB
    lines = [f"memory of one rank: {need.peak / GB:.2f} GB of {usable:.2f} GB usable"]
    groups = {"all the time": need.resident} | {f"while {name}": parts for name, parts in need.phases.items()}
    for title, parts in groups.items():
        fullest = title in ("all the time", f"while {need.fullest}")
        lines.append(f"  {title}: {sum(parts.values()) / GB:.2f} GB{'' if fullest else ' (not the peak)'}")
        lines += [f"    {size / GB:9.3f}  {name}" for name, size in parts.items() if size]
    host, count = sum(need.host.values()), job.cluster.gpus_per_node
    lines.append(f"  host memory: {host / GB:.2f} GB a rank, {(host * count + need.rungs) / GB:.2f} GB the first node")
    lines += [f"    {size / GB:9.3f}  {name}" for name, size in need.host.items()]
    lines += [f"    {need.rungs / GB:9.3f}  snapshots that are rungs (rank 0 alone)"] if need.rungs else []
    written = checkpoint_bytes(job)
    lines.append(f"  written to the disk over the run: {sum(written.values()) / GB:.2f} GB")
    lines += [f"    {size / GB:9.3f}  {name}" for name, size in written.items()]
    return "\n".join(lines)


def traffic_text(job: Job, chosen: Estimate) -> str:
    """Bytes of a step over each link."""
    moved = chosen.traffic
    lines = [f"traffic of one step ({passes(job, chosen.layout)} micro-batches a rank)"]
    if moved.gathered:
        separate = traffic(job, chosen.layout, "separate")
        lines.append(
            f"  weights gathered: paired {moved.ratio:.2f} x base bytes ({moved.gathered / GB:.1f} GB); "
            f"two separate passes: {separate.ratio:.2f} x ({separate.gathered / GB:.1f} GB)"
        )
    else:
        lines.append("  weights gathered: none (whole on every rank)")
    lines.append(
        f"  received by a GPU: {moved.intra / GB:.2f} GB inside the node, {moved.inter / GB:.2f} GB by its NIC"
    )
    inside, outside = moved.reduce_intra / GB, moved.reduce_inter / GB
    lines.append(f"  LoRA and gates: {inside:.3f} GB inside the node, {outside:.3f} GB by its NIC")
    if moved.host:
        lines.append(f"  read from host memory by a GPU: {moved.host / GB:.2f} GB")
    return "\n".join(lines)


def bill_text(plan: Plan) -> str:
    """Hours of the run, and what they are made of."""
    config, bill = plan.job.config, plan.chosen.bill
    source = "train.steps" if config.train.steps else (
        f"{config.train.epochs:g} epochs of {config.data.documents:,} documents at an assumed length"
    )  # fmt: skip
    share, other = bill.shares
    lines = [f"run: {plan.hours:.2f} hours, {plan.gpu_hours:,.1f} GPU-hours; {share:.1%} of it preparation"]
    if bill.hidden:
        hours = bill.best / 3600
        lines.append(f"  {hours:.2f} hours, {other:.1%} of it, where every gather of weights hides behind compute")
    lines += [
        f"  {bill.steps:9,.0f} s  {plan.job.steps:,} steps ({source})",
        f"  {bill.checkpoints:9,.0f} s  checkpoints",
    ]
    return "\n".join([*lines, *(f"  {seconds:9,.0f} s  {name}" for name, seconds in bill.preparation.items())])


def time_text(plan: Plan) -> str:
    """Time of one step."""
    t = plan.chosen.timing
    student, teacher = plan.kept
    best = f" ({t.best:.3f} s where every gather of weights hides behind compute)" if t.best < t.step else ""
    return (
        f"time of one step: {t.step:.3f} s{best}, {plan.job.tokens / t.step:,.0f} tokens/s\n"
        f"  compute {t.compute:.3f} s (kept on average: student {student:.1%}, teacher {teacher:.1%}), "
        f"weights {t.gather:.3f} s, launches {t.launch:.3f} s, offload {t.offload:.3f} s, "
        f"LoRA and gates {t.reduce:.3f} s"
    )


def choice_text(plan: Plan) -> str:
    """The layouts next to the chosen one: those that would be faster and do not fit, and slower ones that fit."""
    lines, chosen = ["other layouts, the fastest first"], plan.chosen
    place = plan.tried.index(chosen)
    faster = [option for option in plan.tried[:place] if not option.fits or not option.layout.offload][-3:]
    slower = [option for option in plan.tried[place + 1 :] if option.fits][:3]
    for option in [*faster, chosen, *slower]:
        verdict = "chosen" if option is chosen else "fits" if option.fits else "does not fit"
        lines.append(
            f"  {layout_text(plan.job, option.layout)}: {option.memory.peak / GB:.1f} GB, "
            f"{option.bill.total / 3600:.2f} hours: {verdict}"
        )
    if not chosen.fits:
        other = "--zero 3, " if all(option.layout.stage == 2 for option in plan.tried) else ""
        lines.append(f"  nothing fits: use {other}shorter sequences (data.seq_len), or GPUs with more memory")
    return "\n".join(lines)


def table_text(rows: list[list[Plan]]) -> str:
    """The Markdown table of several plans, one column entry for each target where they differ, with its assumptions."""
    job = rows[0][0].job
    targets = " / ".join(f"{target:.0%}" for target in TARGETS)
    lines = [
        f"{job.cluster.card.name} of {job.cluster.card.memory / GB:.0f} GB, bfloat16, {job.steps:,} steps of "
        f"{job.config.train.batch_size} x {job.config.data.seq_len} tokens, targets {targets}",
        "",
        "| model | cards | layout | hours (best) | GB a card | host GB a node | preparation (best) | GB written |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for plans in rows:
        cells = [_cells(plan) for plan in plans]
        lines.append("| " + " | ".join(" / ".join(dict.fromkeys(column)) for column in zip(*cells, strict=True)) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in ASSUMPTIONS)])


def _cells(plan: Plan) -> list[str]:
    chosen, job = plan.chosen, plan.job
    hours, share = f"{plan.hours:.1f}", f"{chosen.bill.shares[0]:.1%}"
    if chosen.bill.hidden:
        hours, share = f"{hours} ({chosen.bill.best / 3600:.1f})", f"{share} ({chosen.bill.shares[1]:.1%})"
    return [
        job.config.model.path, str(job.cluster.ranks),
        layout_text(job, chosen.layout) + ("" if chosen.fits else " **does not fit**"), hours,
        f"{chosen.memory.peak / GB:.0f}", f"{plan.node_memory / GB:.0f}", share,
        f"{sum(checkpoint_bytes(job).values()) / GB:.1f}",
    ]  # fmt: skip


def as_dict(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, hours."""

    def figures(option: Estimate) -> dict:
        return {
            "layout": asdict(option.layout),
            "fits": option.fits,
            "memory": asdict(option.memory) | {"peak": option.memory.peak},
            "traffic": asdict(option.traffic) | {"ratio": option.traffic.ratio},
            "time": asdict(option.timing) | {"step": option.timing.step, "best": option.timing.best},
            "bill": asdict(option.bill) | {"total": option.bill.total, "best": option.bill.best},
        }

    return {
        "model": plan.job.config.model.path,
        "parameters": total_parameters(plan.job.spec),
        "cluster": asdict(plan.job.cluster),
        "steps": plan.job.steps,
        "target": plan.job.config.sparsity.target,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "preparation": plan.chosen.bill.shares,
        "node_memory": plan.node_memory,
        "written": checkpoint_bytes(plan.job),
        "limits": {"hours": math.ceil(LIMIT * plan.hours), "gigabytes": math.ceil(HOST_LIMIT * plan.node_memory / GB)},
        "chosen": figures(plan.chosen),
        "tried": [figures(option) for option in plan.tried],
        "settings": run_settings(plan),
        "deepspeed": deepspeed_settings(plan) if plan.chosen.layout.stage else None,
        "assumptions": list(ASSUMPTIONS),
    }
