"""A plan in words and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from nuteprune.errors import UserError
from nuteprune.parallel.sizes import read_parameters, total_parameters
from nuteprune.planning.costs import ASSUMPTIONS, passes, traffic
from nuteprune.planning.footprint import USABLE
from nuteprune.planning.job import Job, Layout
from nuteprune.planning.planner import Estimate, Plan, StagePlan, deepspeed_settings, lay_out, run_settings

GB = 1e9


def plan_text(plan: Plan, files: dict[str, str], verbose: bool, left_out: list[str]) -> str:
    """What `nuteprune plan` prints: a verdict, a line for each stage and for those that are left out, what would be
    cheaper or faster, the files; with `verbose` all figures."""
    blocks = [verdict(plan), "\n".join([stages_text(plan), *left_out]), "\n".join(advice(plan))]
    if verbose:
        blocks += [*figures_of(plan), *(choice_text(plan.job, stage) for stage in plan.stages)]
    blocks += ["\n".join(f"--- {name} ---\n{text.rstrip()}" for name, text in files.items())]
    if verbose:
        blocks += ["assumptions\n" + "\n".join(f"  - {line}" for line in ASSUMPTIONS)]
    return "\n\n".join(blocks)


def figures_of(plan: Plan) -> list[str]:
    """The paragraphs of all figures of a plan's chosen layouts."""
    blocks = [headline(plan), bill_text(plan)]
    for stage in plan.stages:
        found = stage.chosen
        parts = (memory_text(plan.job, found), traffic_text(plan.job, stage), time_text(plan, stage))
        blocks += [f"{stage.name}: {part}" for part in parts]
    written = [f"  {size / GB:9.3f}  {name}" for name, size in plan.written.items()]
    total = sum(plan.written.values())
    return [*blocks, "\n".join([f"written to the disk over the run: {total / GB:.2f} GB", *written])]


def verdict(plan: Plan) -> str:
    """The answer in one line."""
    cluster, usable = plan.job.cluster, USABLE * plan.job.cluster.card.memory
    costs = f"{hours(plan.seconds)} on {cluster.ranks} {cluster.card.name}, {plan.gpu_hours:,.1f} GPU-hours"
    sizes = (
        f"{plan.peak / GB:.0f} GB a GPU, {plan.node_memory / GB:,.0f} GB of host memory, "
        f"{sum(plan.written.values()) / GB:,.0f} GB of disk"
    )
    if plan.fits:
        return f"fits: {costs}, {sizes}; arithmetic, never measured on a card"
    lacking = " and ".join(f"{stage.name} needs {stage.chosen.peak / GB:.0f} GB a GPU" for stage in plan.stages
                           if not stage.chosen.fits)  # fmt: skip
    return f"does not fit: {lacking}, {usable / GB:.0f} of {cluster.card.memory / GB:.0f} may be taken"


def hours(seconds: float) -> str:
    """A duration in seconds below two minutes, in minutes below two hours, in hours above."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def stages_text(plan: Plan) -> str:
    """A line for each stage: its steps, layout, memory of a card and time."""
    lines = []
    for stage in plan.stages:
        found = stage.chosen
        fits = "" if found.fits else "  ** DOES NOT FIT **"
        lines.append(
            f"{stage.name:9}{stage.steps:,} steps, {found.timing.step:.2f} s each, {found.peak / GB:.0f} GB a GPU, "
            f"{hours(found.bill.total)}: {layout_text(plan.job, found.layout)}{fits}"
        )
    lines += [f"{name:9}{hours(seconds)}" for name, seconds in plan.beside.items()]
    if sum(stage.chosen.bill.hidden for stage in plan.stages):
        lines.append(f"all of it: {hours(plan.best)} where every gather of weights hides behind compute")
    return "\n".join(lines)


def advice(plan: Plan) -> list[str]:
    """By the same arithmetic: what half and twice the cards, and the same tokens in larger batches, take."""
    job, lines, offloaded = plan.job, [], any(stage.chosen.layout.offload for stage in plan.stages)
    for name, other in (*others(plan.job), *batches(plan)):
        try:
            found = lay_out(other)
        except UserError:  # such a batch or count of steps cannot be
            continue
        if not found.fits:
            continue
        cheaper = found.gpu_hours < 0.95 * plan.gpu_hours or found.seconds < 0.8 * plan.seconds or not plan.fits
        if cheaper:
            lines.append(
                f"  {name}: {hours(found.seconds)}, {found.gpu_hours:,.1f} GPU-hours, {found.peak / GB:.0f} GB a GPU"
            )
        elif other.cluster.ranks > job.cluster.ranks:
            lines.append(f"  {name} do not help: {hours(found.seconds)}")
    if not plan.fits:
        lines.append("  shorter sequences (data.seq_len) or GPUs with more memory")
    if offloaded:
        lines.append(
            "  offloaded weights cross the link to host memory in each pass: enough cards to hold them are faster"
        )
    return [
        "what would be cheaper or faster" if plan.fits else "what would fit",
        *(lines or ["  nothing that was tried"]),
    ]


def others(job: Job) -> Iterator[tuple[str, Job]]:
    """The run on half and on twice the cards, its batch a multiple of them."""
    cluster = job.cluster
    sizes = []
    if cluster.nodes > 1:
        sizes.append(replace(cluster, nodes=-(-cluster.nodes // 2)))
    elif cluster.gpus_per_node > 1:
        sizes.append(replace(cluster, gpus_per_node=-(-cluster.gpus_per_node // 2)))
    if cluster.gpus_per_node >= 8:
        sizes.append(replace(cluster, nodes=2 * cluster.nodes))
    else:
        sizes.append(replace(cluster, gpus_per_node=2 * cluster.gpus_per_node))
    for each in sizes:
        batch = -(-job.config.train.batch_size // each.ranks) * each.ranks
        train = replace(job.config.train, batch_size=batch)
        yield f"{each.ranks} cards", replace(job, cluster=each, config=replace(job.config, train=train))


def batches(plan: Plan) -> Iterator[tuple[str, Job]]:
    """The same tokens in four times the batch, where steps are short enough to be bound by launches and gathers."""
    job, config = plan.job, plan.job.config
    if config.train.steps < 40:
        return
    train = replace(config.train, batch_size=4 * config.train.batch_size, steps=config.train.steps // 4)
    distill = replace(config.distill, steps=config.distill.steps // 4)
    wider = replace(config, train=train, distill=distill)
    yield f"batches of {train.batch_size} and a quarter of the steps (the same tokens)", replace(job, config=wider)


def headline(plan: Plan) -> str:
    """Model, cluster and batch in three lines."""
    spec, cluster, config, count = plan.job.spec, plan.job.cluster, plan.job.config, total_parameters(plan.job.spec)
    experts = f" in {spec.top_k} of {spec.experts} experts" if spec.experts > 1 else ""
    experts += f" ({read_parameters(spec):,} parameters read for a token)" if experts else ""
    return (
        f"{config.model.path}: {count:,} parameters, {count * plan.job.itemsize / GB:.1f} GB in {config.model.dtype} "
        f"({spec.layers} layers, hidden {spec.hidden}, {spec.heads} heads, {spec.kv_heads} KV, ffn {spec.ffn}"
        f"{experts}, vocabulary {spec.vocab}{' tied' if spec.tied else ''})\n"
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.card.memory / GB:.1f} GB, {cluster.card.name}\n"
        f"batch {config.train.batch_size} x {config.data.seq_len} tokens, {plan.job.local_batch} sequences a rank; "
        f"target {config.sparsity.target:.0%}"
    )


def layout_text(job: Job, layout: Layout) -> str:
    """A layout in one line."""
    options = [("checkpointing", layout.checkpointing), ("offload", layout.offload), ("hpZ", layout.hpz)]
    stage = f"ZeRO-{layout.stage}, " if layout.stage else ""
    size = f"{stage}micro-batch {layout.micro_batch} ({passes(job, layout)} a step)"
    return ", ".join([size, *(name for name, on in options if on)])


def memory_text(job: Job, chosen: Estimate) -> str:
    """Memory of a rank in one stage by part, in GB."""
    need, usable = chosen.memory, USABLE * job.cluster.card.memory / GB
    lines = [f"memory of one rank: {need.peak / GB:.2f} GB of {usable:.2f} GB usable"]
    groups = {"all the time": need.resident} | {f"while {phase}": parts for phase, parts in need.phases.items()}
    for title, parts in groups.items():
        fullest = title in ("all the time", f"while {need.fullest}")
        lines.append(f"  {title}: {sum(parts.values()) / GB:.2f} GB{'' if fullest else ' (not the peak)'}")
        lines += [f"    {size / GB:9.3f}  {part}" for part, size in parts.items() if size]
    host, node = sum(need.host.values()), need.node(job.cluster.gpus_per_node)
    lines.append(f"  host memory: {host / GB:.2f} GB a rank, {node / GB:.2f} GB the first node")
    lines += [f"    {size / GB:9.3f}  {part}" for part, size in need.host.items()]
    lines += [f"    {size / GB:9.3f}  {part} (rank 0 alone)" for part, size in need.first.items()]
    return "\n".join(lines)


def traffic_text(job: Job, stage: StagePlan) -> str:
    """Bytes of a step over each link."""
    chosen, moved = stage.chosen, stage.chosen.traffic
    lines = [f"traffic of one step ({passes(job, chosen.layout)} micro-batches a rank)"]
    if moved.gathered and stage.name == "distill":
        lines.append(f"  weights gathered: {moved.gathered / GB:.1f} GB, the intact model's and the small one's")
    elif moved.gathered:
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
    lines.append(f"  what learns: {inside:.3f} GB inside the node, {outside:.3f} GB by its NIC")
    if moved.host:
        lines.append(f"  read from host memory by a GPU: {moved.host / GB:.2f} GB")
    return "\n".join(lines)


def bill_text(plan: Plan) -> str:
    """What the run's time is made of."""
    config, job = plan.job.config, plan.job
    counted = "" if config.train.steps else (
        f" ({config.train.epochs:g} epochs of {config.data.documents:,} documents at an assumed length)"
    )  # fmt: skip
    lines = [f"run: {job.steps:,} steps of pruning{counted}; {plan.hours:.2f} hours, {plan.gpu_hours:,.1f} GPU-hours"]
    for stage in plan.stages:
        lines.append(f"  {stage.name}")
        lines += [f"    {seconds:9,.0f} s  {name}" for name, seconds in stage.chosen.bill.parts.items()]
    return "\n".join([*lines, *(f"  {seconds:11,.0f} s  {name}" for name, seconds in plan.beside.items())])


def time_text(plan: Plan, stage: StagePlan) -> str:
    """Time of one step."""
    t = stage.chosen.timing
    student, teacher = plan.kept
    best = f" ({t.best:.3f} s where every gather of weights hides behind compute)" if t.best < t.step else ""
    kept = f" (kept on average: student {student:.1%}, teacher {teacher:.1%})" if stage.name == "prune" else ""
    return (
        f"time of one step: {t.step:.3f} s{best}, {plan.job.tokens / t.step:,.0f} tokens/s\n"
        f"  compute {t.compute:.3f} s{kept}, "
        f"weights {t.gather:.3f} s, launches {t.launch:.3f} s, offload {t.offload:.3f} s, "
        f"what learns {t.reduce:.3f} s"
    )


def choice_text(job: Job, stage: StagePlan) -> str:
    """The layouts next to the chosen one: those that would be faster and do not fit, and slower ones that fit."""
    lines, chosen = [f"{stage.name}: other layouts, the fastest first"], stage.chosen
    place = stage.tried.index(chosen)
    faster = [option for option in stage.tried[:place] if not option.fits or not option.layout.offload][-3:]
    slower = [option for option in stage.tried[place + 1 :] if option.fits][:3]
    for option in [*faster, chosen, *slower]:
        told = "chosen" if option is chosen else "fits" if option.fits else "does not fit"
        lines.append(
            f"  {layout_text(job, option.layout)}: {option.peak / GB:.1f} GB, {hours(option.bill.total)}: {told}"
        )
    return "\n".join(lines)


def as_dict(plan: Plan, files: dict[str, str] | None = None) -> dict:
    """The plan as plain data: bytes, seconds, hours; `files` as in `run_settings`."""

    def figures(option: Estimate) -> dict:
        return {
            "layout": asdict(option.layout),
            "fits": option.fits,
            "memory": asdict(option.memory) | {"peak": option.memory.peak},
            "traffic": asdict(option.traffic) | {"ratio": option.traffic.ratio},
            "time": asdict(option.timing) | {"step": option.timing.step, "best": option.timing.best},
            "bill": option.bill.parts | {"total": option.bill.total, "best": option.bill.best},
        }

    def whole(stage: StagePlan) -> dict:
        zero = deepspeed_settings(stage.chosen.layout) if stage.chosen.layout.stage else None
        return {
            "name": stage.name, "steps": stage.steps, "chosen": figures(stage.chosen),
            "tried": [figures(option) for option in stage.tried], "deepspeed": zero,
        }  # fmt: skip

    return {
        "verdict": verdict(plan),
        "model": plan.job.config.model.path,
        "parameters": total_parameters(plan.job.spec),
        "cluster": asdict(plan.job.cluster),
        "target": plan.job.config.sparsity.target,
        "fits": plan.fits,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "node_memory": plan.node_memory,
        "written": plan.written,
        "limits": plan.limits,
        "stages": [whole(stage) for stage in plan.stages],
        "beside": plan.beside,
        "settings": run_settings(plan, files or {}),
        "assumptions": list(ASSUMPTIONS),
    }
