"""A plan in words, as a row of a table and as plain data."""

from __future__ import annotations

from dataclasses import asdict

from nuteprune.parallel.sizes import read_parameters, total_parameters
from nuteprune.planning.bill import checkpoint_bytes, distillation_bytes
from nuteprune.planning.costs import ASSUMPTIONS, passes, traffic
from nuteprune.planning.footprint import USABLE, Memory
from nuteprune.planning.job import Job, Layout
from nuteprune.planning.planner import (
    TARGETS,
    Estimate,
    Plan,
    deepspeed_settings,
    run_settings,
)

GB = 1e9


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
    """Memory of a rank by part, in GB, and what a run writes."""
    asked = "" if job.config.distill.steps else " (distill.steps=0: not part of this run)"
    lines = stage_lines("memory of one rank", job, chosen.memory)
    lines += stage_lines(f"while the export is distilled{asked}", job, chosen.distilling)
    written = checkpoint_bytes(job) | distillation_bytes(job)
    lines.append(f"written to the disk over the run: {sum(written.values()) / GB:.2f} GB")
    lines += [f"  {size / GB:9.3f}  {name}" for name, size in written.items()]
    return "\n".join(lines)


def stage_lines(name: str, job: Job, need: Memory) -> list[str]:
    """Memory of a rank in one stage by part."""
    usable = USABLE * job.cluster.card.memory / GB
    lines = [f"{name}: {need.peak / GB:.2f} GB of {usable:.2f} GB usable"]
    groups = {"all the time": need.resident} | {f"while {phase}": parts for phase, parts in need.phases.items()}
    for title, parts in groups.items():
        fullest = title in ("all the time", f"while {need.fullest}")
        lines.append(f"  {title}: {sum(parts.values()) / GB:.2f} GB{'' if fullest else ' (not the peak)'}")
        lines += [f"    {size / GB:9.3f}  {part}" for part, size in parts.items() if size]
    host, node = sum(need.host.values()), need.node(job.cluster.gpus_per_node)
    lines.append(f"  host memory: {host / GB:.2f} GB a rank, {node / GB:.2f} GB the first node")
    lines += [f"    {size / GB:9.3f}  {part}" for part, size in need.host.items()]
    return lines + [f"    {size / GB:9.3f}  {part} (rank 0 alone)" for part, size in need.first.items()]


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
    if steps := config.distill.steps:
        lines.append(f"  {bill.distillation:9,.0f} s  distillation: {steps:,} steps, taken to be as long as pruning's, "
                     "loading and checkpoints")  # fmt: skip
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
            f"  {layout_text(plan.job, option.layout)}: {option.peak / GB:.1f} GB, "
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
        f"{chosen.peak / GB:.0f}", f"{plan.node_memory / GB:.0f}", share,
        f"{sum(checkpoint_bytes(job).values()) / GB:.1f}",
    ]  # fmt: skip


def as_dict(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, hours."""

    def figures(option: Estimate) -> dict:
        return {
            "layout": asdict(option.layout),
            "fits": option.fits,
            "memory": asdict(option.memory) | {"peak": option.memory.peak},
            "distilling": asdict(option.distilling) | {"peak": option.distilling.peak},
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
        "written": checkpoint_bytes(plan.job) | distillation_bytes(plan.job),
        "limits": plan.limits,
        "chosen": figures(plan.chosen),
        "tried": [figures(option) for option in plan.tried],
        "settings": run_settings(plan),
        "deepspeed": deepspeed_settings(plan) if plan.chosen.layout.stage else None,
        "assumptions": list(ASSUMPTIONS),
    }
