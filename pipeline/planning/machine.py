"""What this machine offers a run, and the settings that a person would otherwise have to look up for it."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from nuteprune.arch import ArchSpec
from nuteprune.config import Config, flatten, load_config, to_dict
from nuteprune.model.losses import learns_of_outputs
from nuteprune.parallel.distributed import World
from nuteprune.parallel.host import free_memory, multiplies_bfloat16, processor
from nuteprune.planning.cards import CARDS, UNNAMED, Card
from nuteprune.planning.distilling import distillation_memory
from nuteprune.planning.footprint import PROCESS_BYTES, USABLE, host_memory
from nuteprune.planning.job import Cluster, Job, Layout
from nuteprune.planning.planner import Plan, make_plan, within

log = logging.getLogger(__name__)

_PROBE = """
import json, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
bf16 = bool(cards) and torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps({"names": [c.name for c in cards], "memory": [c.total_memory for c in cards], "bf16": bf16}))
"""
"""In a process of its own: whoever asks a card keeps a part of its memory."""
CPU_STEPS, CPU_BATCH, CPU_SEQUENCE = 120, 4, 256
GPU_STEPS = 2000
PRUNING = 120
"""Steps in which a run learns what to remove before its export is distilled, if they are not more than half of all;
a tenth of all where that is more."""
DAY = 24 * 3600
"""Seconds of distillation at most that a run begins by itself."""
CPU_SHARE = 0.7
"""Share of a processor's free memory that distillation may take; checkpoints and other programs have the rest."""


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        name: of its cards, or of its processor.
        ranks: one a card; 1 without cards.
        card: what the planner computes with, None without cards.
        bf16: whether it multiplies bfloat16 in hardware.
    """

    name: str
    ranks: int = 1
    card: Card | None = None
    bf16: bool = False


@dataclass(frozen=True)
class Choice:
    """A setting that was left open: its key, what was chosen, and why."""

    key: str
    value: Any
    why: str


def this_machine() -> Machine:
    """The cards that torch sees here, or else the processor."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {"names": []}
    if not found["names"]:
        return _processor()
    card = replace(card_of(found["names"][0]), memory=float(min(found["memory"])))
    count = len(found["names"])
    return Machine(f"{count} x {found['names'][0]}", count, card, found["bf16"])


def _processor() -> Machine:
    return Machine(processor().get("model name", "CPU"), bf16=bool(multiplies_bfloat16()))


def card_of(name: str) -> Card:
    """The known card with the longest name all of whose words are in a driver's name; the slowest where none is."""
    words = name.lower()
    known = [card for card in CARDS.values() if all(word in words for word in card.name.split("-"))]
    return max(known, key=lambda card: len(card.name), default=UNNAMED)


def choose(
    config: Config, given: Collection[str], machine: Machine, spec: ArchSpec, cluster: Cluster | None = None
) -> tuple[list[Choice], Plan | None]:
    """Settings for a run on a machine that its user leaves open, and the plan that they follow.

    Args:
        config: the settings so far.
        given: keys of those that the user set (`given_keys`).
        machine: where the run goes.
        spec: its model.
        cluster: of the plan, instead of this machine, whose free host memory does not count then.

    Raises:
        UserError: as `make_plan`.
    """
    default = flatten(to_dict(load_config(None)))
    choices: list[Choice] = []

    def take(key: str, value: Any, why: str) -> None:
        if key not in given and value != default[key]:
            choices.append(Choice(key, value, why))

    def chosen() -> Config:
        return load_config(config, [f"{choice.key}={choice.value}" for choice in choices])

    if machine.bf16:
        take("model.dtype", "bfloat16", f"{machine.name} multiplies it, in half the memory")
    free_steps = not {"train.steps", "train.epochs"}.intersection(given)
    unwanted = config.sparsity.constraint != "projection" or "distill.steps" in given
    may_distil = free_steps and learns_of_outputs(config.loss) and not unwanted

    def take_steps(steps: int, budget: str, lacking: str) -> None:
        first = pruning_steps(steps)
        if may_distil and lacking:
            choices.append(Choice("distill.steps", 0, f"left out: {lacking}"))
        if may_distil and not lacking:
            take("train.steps", first, f"{budget}, in which it learns what to remove")
            take("distill.steps", steps - first, "the rest of it: the small model's own weights learn")
        elif free_steps:
            take("train.steps", steps, budget)

    if machine.card is None:
        for key, value in (("data.seq_len", CPU_SEQUENCE), ("train.batch_size", CPU_BATCH)):
            take(key, value, "a step of seconds on a CPU")
        alone = Job(spec, chosen(), Cluster(1, 1, UNNAMED))
        wanted, free = distillation_memory(alone, Layout(0, 1, False)).peak, CPU_SHARE * free_memory()
        lacking = f"needs {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} may be taken" if wanted >= free else ""
        take_steps(CPU_STEPS, "a run of minutes to hours on a CPU", lacking)
        return choices, None
    batch, free = config.train.batch_size, math.inf if cluster else free_memory()
    cluster = cluster or Cluster(1, machine.ranks, machine.card)
    take("train.batch_size", -(-batch // cluster.ranks) * cluster.ranks, "a multiple of the ranks")

    def planned(*steps: str) -> Plan:
        return make_plan(Job(spec, load_config(chosen(), steps), cluster))

    plan, lacking = planned(*[f"train.steps={GPU_STEPS}"] * free_steps), ""
    usable = USABLE * machine.card.memory
    if may_distil:
        first = pruning_steps(GPU_STEPS)
        both = planned(f"train.steps={first}", f"distill.steps={GPU_STEPS - first}")
        stage = both.stages[1]
        best, host = stage.chosen, stage.chosen.memory.node(cluster.gpus_per_node)
        if not best.fits or best.bill.total > DAY:
            least = min(each.peak for each in stage.tried if not each.layout.offload)
            lacking = f"needs {least / 1e9:.0f} GB a card, {usable / 1e9:.0f} may be taken"
            if best.fits:
                lacking += f"; with offloaded weights it would take {best.bill.total / 3600:.0f} hours"
        elif host >= free:
            lacking = f"needs {host / 1e9:.0f} GB of host memory, {free / 1e9:.0f} are free"
        else:
            plan = both
    for key, stage in zip(("deepspeed", "distill.deepspeed"), plan.stages, strict=False):
        why = f"planned: {stage.chosen.peak / 1e9:.1f} GB of {machine.card.memory / 1e9:.0f}; "
        why += "the weights are shared out" if stage.chosen.layout.stage == 3 else "each card holds them"
        if (name := zero_name(stage.chosen.layout)) != (zero_name(plan.pruning.layout) if key != "deepspeed" else ""):
            take(key, name, why)
    take_steps(GPU_STEPS, "the README's budget of a 7B model", lacking)
    return choices, plan


def zero_name(layout: Layout) -> str:
    """The name of a layout's DeepSpeed settings; empty without."""
    return f"zero{layout.stage}{'_offload' if layout.offload else ''}" if layout.stage else ""


def pruning_steps(steps: int) -> int:
    """How many of a run's steps learn what to remove, where its export is distilled in the others."""
    return max(min(PRUNING, steps // 2), steps // 10)


def with_micro_batch(
    config: Config, spec: ArchSpec, world: World, zero: dict | None, steps: int, stage: str = "prune"
) -> Config:
    """The run with micro-batch and activation checkpointing as planned for the memory that is free, where
    `train.micro_batch` is 0; collective.

    Args:
        config: the run.
        spec: its architecture.
        world: this rank's place.
        zero: complete DeepSpeed settings, or None.
        steps: of the run.
        stage: "distill", whose models are not loaded yet, or any other, which is planned as pruning is.
    """
    if config.train.micro_batch:
        return config
    cluster = cluster_of(world)
    job = Job(spec, replace(config, train=replace(config.train, steps=steps)), cluster)
    layout, card = layout_of(zero, config.train.activation_checkpointing), cluster.card
    if world.device.type == "cuda":
        free, card = float(torch.cuda.mem_get_info(world.device)[0]), card_of(torch.cuda.get_device_name(world.device))
    else:  # shared with a machine's other ranks, and with what a card's rank keeps on the host; the process is there
        beside = 0 if stage == "distill" else sum(host_memory(job, layout).values()) - PROCESS_BYTES
        free = free_memory() / world.local_size - beside
    free = max(0.0, min(world.gather(free)))
    layout = within(stage, replace(job, cluster=replace(cluster, card=replace(card, memory=free))), layout)
    size, again = layout.micro_batch, layout.checkpointing
    if size < job.local_batch or again > config.train.activation_checkpointing:
        more = ", each layer computed again" if again > config.train.activation_checkpointing else ""
        log.info("%d of %d sequences at a time%s, as planned for %.1f GB", size, job.local_batch, more, free / 1e9)
    return replace(config, train=replace(config.train, micro_batch=size, activation_checkpointing=again))


def cluster_of(world: World) -> Cluster:
    """The ranks of a run as nodes that are alike; where theirs are not, as smaller ones."""
    alike = math.gcd(world.size, world.local_size)
    return Cluster(world.size // alike, alike, UNNAMED)


def layout_of(zero: dict | None, checkpointing: bool) -> Layout:
    """The layout that complete DeepSpeed settings (None: without) stand for, one sequence at a time."""
    section: dict[str, Any] = zero["zero_optimization"] if zero else {"stage": 0}
    offload = (section.get("offload_param") or {}).get("device", "none") != "none"
    return Layout(section["stage"], 1, checkpointing, offload, section.get("zero_hpz_partition_size", 1) > 1)
