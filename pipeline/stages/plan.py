"""The plan command: memory, traffic and time of a run on a cluster from config.json alone, and the settings for it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import yaml

from nuteprune.config import Config, ConfigError, Dtype
from nuteprune.parallel.sizes import read_parameters
from nuteprune.planning.costs import ASSUMPTIONS, extra_steps, passes, traffic
from nuteprune.planning.footprint import USABLE, Cluster, Job, Layout, Memory, total_parameters
from nuteprune.planning.planner import (
    MODELS,
    Estimate,
    Plan,
    deepspeed_settings,
    make_plan,
    quantity,
    read_model,
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
        text = json.dumps({name: as_dict(plan) for name, plan in rows}, indent=2) if args.json else table_text(rows)
        return Outcome(text, all(plan.chosen.fits for _, plan in rows))
    model, spec = read_model(args.model or config.model.path)
    named = str(getattr(model, "dtype", None)).removeprefix("torch.")
    dtype: Dtype | None = next((known for known in get_args(Dtype) if known == named), None)
    if not dtype_given and dtype is not None:
        config = replace(config, model=replace(config.model, dtype=dtype))
    if args.model:
        config = replace(config, model=replace(config.model, path=args.model))
    plan = make_plan(Job(spec, config, cluster), args.tokens_per_document, args.zero)
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
    return Cluster(
        args.nodes,
        args.gpus_per_node,
        quantity("--gpu-memory", args.gpu_memory, "bytes"),
        quantity("--intra-bandwidth", args.intra_bandwidth, "rate"),
        quantity("--inter-bandwidth", args.inter_bandwidth, "rate"),
        quantity("--host-bandwidth", args.host_bandwidth, "rate"),
        quantity("--flops", args.flops, "flops"),
        args.mfu,
    )


def settings_files(plan: Plan, out: Path | None) -> dict[str, str]:
    """Text of plan.yaml and deepspeed.json, by name."""
    cluster = plan.job.cluster
    deepspeed = str(out / "deepspeed.json") if out else "deepspeed.json"
    launch = f"deepspeed --num_nodes {cluster.nodes} --num_gpus {cluster.gpus_per_node} --module nuteprune prune"
    head = f"# {launch} --config plan.yaml\n# DeepSpeed settings: {deepspeed}\n"
    if plan.job.config.model.path.lower() in MODELS:
        head += "# model.path is a name of the planner: set it to the model's directory or hub id\n"
    return {
        "plan.yaml": head + yaml.safe_dump(run_settings(plan, deepspeed), sort_keys=False),
        "deepspeed.json": json.dumps(deepspeed_settings(plan), indent=2) + "\n",
    }


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
    plan = make_plan(Job(read_model(config.model.path)[1], config, read_cluster(args)), args.tokens_per_document)
    parts = (headline(plan), memory_text(plan.job, plan.chosen), traffic_text(plan.job, plan.chosen), time_text(plan))
    return "\n\n".join(parts)


def plan_text(plan: Plan, files: dict[str, str]) -> str:
    """The whole plan, as printed."""
    job, chosen = plan.job, plan.chosen
    blocks = [
        *(headline(plan), memory_text(job, chosen), traffic_text(job, chosen), time_text(plan), choice_text(plan)),
        "\n".join(f"--- {name} ---\n{text.rstrip()}" for name, text in files.items()),
        "assumptions\n" + "\n".join(f"  - {line}" for line in ASSUMPTIONS),
    ]
    return "\n\n".join(blocks)


def headline(plan: Plan) -> str:
    """Model, cluster and batch in three lines."""
    spec, cluster, config, count = plan.job.spec, plan.job.cluster, plan.job.config, total_parameters(plan.job.spec)
    experts = f" in {spec.top_k} of {spec.experts} experts" if spec.experts > 1 else ""
    experts += f" ({read_parameters(spec):,} parameters read for a token)" if experts else ""
    return (
        f"{config.model.path}: {count:,} parameters, {count * plan.job.itemsize / GB:.1f} GB in {config.model.dtype} "
        f"({spec.layers} layers, hidden {spec.hidden}, {spec.heads} heads, {spec.kv_heads} KV, ffn {spec.ffn}"
        f"{experts}, vocabulary {spec.vocab}{' tied' if spec.tied else ''})\n"
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / GB:.1f} GB; batch "
        f"{config.train.batch_size} x {config.data.seq_len} tokens, {plan.job.local_batch} sequences a rank; target "
        f"{config.sparsity.target:.0%}\n"
        f"layout: {layout_text(plan.job, plan.chosen.layout)}"
        f"{'' if plan.chosen.fits else '  ** DOES NOT FIT **'}"
    )


def layout_text(job: Job, layout: Layout) -> str:
    """A layout in one line."""
    options = [("checkpointing", layout.checkpointing), ("offload", layout.offload), ("hpZ", layout.hpz)]
    size = f"ZeRO-{layout.stage}, micro-batch {layout.micro_batch} ({passes(job, layout)} a step)"
    return ", ".join([size, *(name for name, on in options if on)])


def memory_text(job: Job, chosen: Estimate) -> str:
    """Memory of a rank by part, in GB."""
    need = chosen.memory
    usable = USABLE * job.cluster.gpu_memory / GB
    lines = [f"memory of one rank: {need.peak / GB:.2f} GB of {usable:.2f} GB usable"]
    phase = "layer" if sum(need.layer_phase.values()) >= sum(need.head_phase.values()) else "head"
    for title, parts, counts in _memory_groups(need, phase):
        lines.append(f"  {title}: {sum(parts.values()) / GB:.2f} GB{'' if counts else ' (not the peak)'}")
        lines += [f"    {size / GB:9.3f}  {name}" for name, size in parts.items() if size]
    host = sum(need.host.values())
    lines.append(f"  host memory: {host / GB:.2f} GB a rank, {host * job.cluster.gpus_per_node / GB:.2f} GB a node")
    lines += [f"    {size / GB:9.3f}  {name}" for name, size in need.host.items()]
    return "\n".join(lines)


def _memory_groups(need: Memory, phase: str) -> list[tuple[str, dict[str, float], bool]]:
    return [
        ("all the time", need.resident, True),
        ("while a layer runs", need.layer_phase, phase == "layer"),
        ("while the output loss runs", need.head_phase, phase == "head"),
    ]


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


def time_text(plan: Plan) -> str:
    """Step time and length of the run."""
    t, config, extra = plan.chosen.timing, plan.job.config, extra_steps(plan.job.config)
    source = "train.steps" if config.train.steps else (
        f"{config.train.epochs:g} epochs of {config.data.documents:,} documents at an assumed length"
    )  # fmt: skip
    rate = config.train.batch_size * config.data.seq_len / t.step
    student, teacher = plan.kept
    return (
        f"time of one step: {t.step:.3f} s (without overlap {t.serial:.3f} s), {rate:,.0f} tokens/s\n"
        f"  compute {t.compute:.3f} s (kept on average: student {student:.1%}, teacher {teacher:.1%}), "
        f"weights {t.gather:.3f} s, launches {t.launch:.3f} s, offload {t.offload:.3f} s, "
        f"LoRA and gates {t.reduce:.3f} s\n"
        f"run: {plan.steps:,} steps ({source}) and {extra} for importance and structures: {plan.hours:.2f} hours = "
        f"{plan.hours / 24:.2f} days, {plan.gpu_hours:,.1f} GPU-hours"
    )


def choice_text(plan: Plan) -> str:
    """What was tried, in order of preference, and what else would help."""
    lines = ["tried, in order of preference"]
    for option in plan.tried:
        verdict = "fits" if option.fits else "does not fit"
        lines.append(
            f"  {layout_text(plan.job, option.layout)}: {option.memory.peak / GB:.1f} GB, {option.timing.step:.3f} s "
            f"a step: {verdict}"
        )
    if plan.chosen.layout.hpz:
        lines.append("  then hpZ: it fits as well, and is faster")
    if plan.fastest:
        layout = layout_text(plan.job, plan.fastest.layout)
        lines.append(f"  faster, and fits too: {layout}: {plan.fastest.timing.step:.3f} s a step")
    if not plan.chosen.fits:
        other = "--zero 3, " if plan.chosen.layout.stage == 2 else ""
        lines.append(f"  nothing fits: use {other}shorter sequences (data.seq_len), or GPUs with more memory")
    return "\n".join(lines)


def table_text(rows: list[tuple[str, Plan]]) -> str:
    """The Markdown table of several plans, with its assumptions."""
    cluster, config = rows[0][1].job.cluster, rows[0][1].job.config
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / GB:.1f} GB, bfloat16, batch "
        f"{config.train.batch_size} x {config.data.seq_len} tokens, target {config.sparsity.target:.0%}",
        "",
        "| model | parameters | layout | GPU GB/rank | teachers GB/node | gathered GB/step | x base | NIC GB/step "
        "| s/step | hours | GPU-hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, plan in rows:
        best = plan.chosen
        teachers = next(size for part, size in best.memory.host.items() if part.startswith("teachers"))
        cells = [
            name, f"{total_parameters(plan.job.spec):,}",
            layout_text(plan.job, best.layout) + ("" if best.fits else " **does not fit**"),
            f"{best.memory.peak / GB:.1f}", f"{teachers * cluster.gpus_per_node / GB:.1f}",
            f"{best.traffic.gathered / GB:.1f}", f"{best.traffic.ratio:.2f}", f"{best.traffic.inter / GB:.2f}",
            f"{best.timing.step:.3f}", f"{plan.hours:.2f}", f"{plan.gpu_hours:,.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in ASSUMPTIONS)])


def as_dict(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, hours."""

    def figures(option: Estimate) -> dict:
        return {
            "layout": asdict(option.layout),
            "fits": option.fits,
            "memory": asdict(option.memory) | {"peak": option.memory.peak},
            "traffic": asdict(option.traffic) | {"ratio": option.traffic.ratio},
            "time": asdict(option.timing) | {"step": option.timing.step, "serial": option.timing.serial},
        }

    return {
        "model": plan.job.config.model.path,
        "parameters": total_parameters(plan.job.spec),
        "cluster": asdict(plan.job.cluster),
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "chosen": figures(plan.chosen),
        "tried": [figures(option) for option in plan.tried],
        "fastest": figures(plan.fastest) if plan.fastest else None,
        "settings": run_settings(plan),
        "deepspeed": deepspeed_settings(plan),
        "assumptions": list(ASSUMPTIONS),
    }
