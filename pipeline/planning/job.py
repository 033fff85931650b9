"""A run to be planned: its machines, its layout, and the sizes that follow from its settings. Elements, unless told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from nuteprune.arch import ArchSpec
from nuteprune.config import Config
from nuteprune.errors import UserError
from nuteprune.masks import gated_kinds, unit_shape
from nuteprune.masks.schedule import Schedule
from nuteprune.parallel.sizes import projection_shapes
from nuteprune.planning.cards import CARDS, Card
from nuteprune.training.refit import TOKENS
from nuteprune.training.teachers import TEACHERS, Teacher

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FP32 = 4
TOKENS_PER_DOCUMENT = 427.0
"""C4.EN: 156e9 tokens in 365e6 documents (Dodge et al. 2021, arXiv 2104.08758, table 1)."""


@dataclass(frozen=True)
class Cluster:
    """The machines, as the flags give them.

    Args:
        nodes, gpus_per_node: counts.
        card: each GPU.
        mfu: share of a card's peak that products reach.
        disk: bytes/s of a file system, read or written.
    """

    nodes: int
    gpus_per_node: int
    card: Card = CARDS["h100"]
    mfu: float = 0.4
    disk: float = 1e9

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """What can be turned on to make a run fit.

    Args:
        stage: ZeRO stage: 2 keeps the frozen weights whole on each rank, 3 partitions them; 0 without DeepSpeed.
        micro_batch: sequences of one forward pass on a rank.
        checkpointing: recompute each student layer in the backward pass.
        offload: the rank's shard of the frozen weights lives in host memory (stage 3).
        hpz: a second copy of the frozen weights is partitioned inside each node (stage 3).
    """

    stage: int
    micro_batch: int
    checkpointing: bool = False
    offload: bool = False
    hpz: bool = False


@dataclass(frozen=True)
class Job:
    """A run to be planned: its architecture, configuration and cluster, and an assumed length of a document."""

    spec: ArchSpec
    config: Config
    cluster: Cluster
    tokens_per_document: float = TOKENS_PER_DOCUMENT

    @property
    def policy(self) -> type[Teacher]:
        """Who teaches."""
        return TEACHERS[self.config.teacher.mode]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the frozen weights and activations."""
        return ITEMSIZE[self.config.model.dtype]

    @property
    def flops(self) -> float:
        """FLOP/s that products in the model's type reach on one GPU."""
        card = self.cluster.card
        return self.cluster.mfu * (card.single if self.itemsize == FP32 else card.flops)

    @property
    def tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.config.train.batch_size * self.config.data.seq_len

    @property
    def local_batch(self) -> int:
        """Sequences of one rank and step; raises `UserError` if the ranks do not divide the batch."""
        batch, ranks = self.config.train.batch_size, self.cluster.ranks
        if batch % ranks:
            above = -(-batch // ranks) * ranks
            raise UserError(
                f"train.batch_size {batch} cannot be split over {ranks} ranks "
                f"({self.cluster.nodes} x {self.cluster.gpus_per_node}): set train.batch_size={above}"
            )
        return batch // ranks

    @property
    def text(self) -> float:
        """Tokens of the text; without end where all documents are read."""
        return self.config.data.documents * self.tokens_per_document or math.inf

    @cached_property
    def schedule(self) -> Schedule:
        """The run's steps; raises `UserError` where they depend on a text whose length is not known."""
        config = self.config
        if not config.train.steps and not config.data.documents:
            raise UserError("data.documents is 0 (all), so the planner cannot count them: set train.steps")
        return Schedule.of(config, self.text // config.data.seq_len / config.train.batch_size)

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.schedule.total

    @property
    def lora_sizes(self) -> list[int]:
        """Elements of each trained LoRA matrix of one layer."""
        shapes, lora = projection_shapes(self.spec), self.config.lora
        return [lora.rank * side for name in lora.targets for side in shapes[name]]

    @property
    def refit_sizes(self) -> list[int]:
        """Elements of the two matrices of a layer's frozen pair (`lora.refit`); none where there is no such pair."""
        lora, spec = self.config.lora, self.spec
        there = (
            lora.refit
            and "down_proj" in set(lora.targets) & set(spec.lora_targets)
            and "ffn" in self.config.gates.units
        )
        return [lora.refit * side for side in projection_shapes(spec)["down_proj"]] if there else []

    @property
    def lora_parameters(self) -> int:
        """Elements of all trained LoRA matrices."""
        return self.spec.layers * sum(self.lora_sizes)

    @property
    def refit_parameters(self) -> int:
        """Elements of the frozen pairs of all layers."""
        return self.spec.layers * sum(self.refit_sizes)

    @property
    def gate_sizes(self) -> list[int]:
        """Gates (log-alphas) of the run, by kind."""
        kinds = gated_kinds(self.spec, self.config.gates.units)
        return [torch.Size(unit_shape(self.spec, kind)).numel() for kind in kinds]

    @property
    def gate_units(self) -> int:
        """All of them."""
        return sum(self.gate_sizes)

    @property
    def snapshots(self) -> int:
        """Snapshots recorded over a run: one per interval up to the target, at most one a step of the warm-up."""
        config = self.config
        if not self.policy.records:
            return 0
        return min(int(config.sparsity.target / config.teacher.interval + 1e-6), self.schedule.warmup)

    @property
    def teaching(self) -> int:
        """Those of them that can ever teach: far enough below the target for the policy."""
        teacher = self.config.teacher
        limit = self.policy.limit(teacher, self.config.sparsity.target)
        return min(self.snapshots, max(0, int(limit / teacher.interval + 1e-6)))

    @property
    def rung_tensors(self) -> list[int]:
        """Bytes of each tensor of a snapshot that cannot teach: gates and scores in float32."""
        return [FP32 * size for size in self.gate_sizes] * 2

    @property
    def teacher_tensors(self) -> list[int]:
        """Bytes of each tensor of one that can: those, and trained LoRA in bfloat16."""
        return [2 * size for size in self.lora_sizes] * self.spec.layers + self.rung_tensors

    @property
    def frozen_tensors(self) -> list[int]:
        """Bytes of each tensor of the frozen pairs of all layers in bfloat16; snapshots between two fits share them."""
        return [2 * size for size in self.refit_sizes] * self.spec.layers

    @property
    def refit_tokens(self) -> float:
        """Tokens that refit reads: `TOKENS` for each FFN unit of a layer, all of a text that has fewer."""
        return min(TOKENS * self.spec.ffn, self.text) if self.refit_sizes else 0
