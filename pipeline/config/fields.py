"""Every setting of a run as frozen dataclasses; each field carries its meaning and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

Unit = Literal["heads", "kv_groups", "ffn", "hidden", "attn_sublayers", "ffn_sublayers", "layers", "experts"]
Shape = Literal["uniform", "per_layer_ffn", "per_layer"]
DEFAULT_UNITS: dict[Shape, list[Unit]] = {
    "uniform": ["ffn"], "per_layer_ffn": ["attn_sublayers", "ffn"], "per_layer": ["kv_groups", "ffn"],
}  # fmt: skip
"""What is gated by default in a shape, as measured (docs/results.md)."""
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Dtype = Literal["float32", "bfloat16", "float16"]
ExportShape = Literal[Shape, "as_trained"]


def opt(default: Any, help: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None,
        lt: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with its meaning and bounds (ge/gt: lower, le/lt: upper) kept as metadata."""
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is pruned."""

    path: str = opt("", "Directory or hub id of the pretrained causal language model.")
    dtype: Dtype = opt(
        "float32", "Number type in which the frozen weights are held; a CPU without avx512_bf16 or amx_bf16 is many "
        "times as slow in bfloat16."
    )  # fmt: skip
    attention: Literal["sdpa", "eager", "flash_attention_2"] = opt(
        "sdpa", "The attention of transformers that is used."
    )


@dataclass(frozen=True)
class DataConfig:
    """The text that it is pruned on."""

    source: str = opt(
        "c4", "A .jsonl, .json, .txt, .parquet or .csv file (.gz, .zst, .bz2, .xz behind it), a directory or a pattern "
        "(`*`) of those, or a data set of the hub as NAME:SPLIT or NAME:CONFIGURATION:SPLIT (`c4`: its "
        "allenai/c4:en:train). "
        "Several stand between commas; weights (a.jsonl:3,b.jsonl:1) mix their documents until one ends."
    )  # fmt: skip
    documents: int = opt(20_000, "At most this many documents are read; 0: all.", ge=0)
    text_field: str = opt("text", "The column that holds the text in files that have columns, those of `evaluate` too.")
    seq_len: int = opt(512, "Tokens of a training sequence, which documents are packed into.", ge=8)


@dataclass(frozen=True)
class SparsityConfig:
    """How much is removed, and when."""

    target: float = opt(0.2, "Share of the prunable parameters (decoder projections) that is removed.", gt=0, lt=1)
    warmup: float = opt(0.4, "Share of the steps over which the sparsity rises to the target.", gt=0, le=1)
    constraint: Literal["projection", "lagrangian"] = opt(
        "projection", "`projection` holds a sparsity that rises as a cubic; `lagrangian` (the paper) pulls towards one "
        "that rises linearly."
    )  # fmt: skip


@dataclass(frozen=True)
class GateConfig:
    """What may be removed, and how gates learn it."""

    shape: Shape = opt(
        "per_layer_ffn", "`per_layer_ffn` keeps the same attention in each layer that has one and an FFN width of its "
        "own; `uniform` keeps the same counts in every layer, a stock architecture; `per_layer` keeps free counts."
    )  # fmt: skip
    units: list[Unit] = opt(
        [], "Kinds of units that may leave: heads, kv_groups, ffn, hidden, attn_sublayers, ffn_sublayers, layers, "
        "experts; empty: ffn, with attn_sublayers in the shape `per_layer_ffn` and kv_groups in `per_layer`."
    )  # fmt: skip
    ffn_multiple: int = opt(
        128, "FFN widths are multiples of this (not in the shape `per_layer`), halved where the target would be "
        "missed.", ge=1
    )  # fmt: skip
    hidden_multiple: int = opt(
        64, "The hidden size is a multiple of this, halved where the target would be missed.", ge=1
    )
    tensor_parallel: int = opt(
        1, "KV groups and FFN widths can be split evenly over this many GPUs (not in the shape `per_layer`).", ge=1
    )
    settle: float = opt(0.45, "Share of the steps after which the gates are exactly 0 or 1 and stay; 1: never.",
                        gt=0, le=1)  # fmt: skip
    init: Literal["importance", "drop_rate"] = opt(
        "importance", "Gates start in the order of first-order Taylor importance, or (`drop_rate`, the paper) with a "
        "drop rate of 1% each."
    )  # fmt: skip
    importance_tokens: int = opt(
        65536, "Tokens over which the importance is summed, at most all of the text.", ge=1
    )  # fmt: skip
    init_spread: float = opt(2.0, "Standard deviation of the first log-alpha where it follows the importance.", gt=0)
    optimizer: Literal["adam", "sgd"] = opt(
        "sgd", "`sgd` has momentum and divides the gradients per parameter of a unit by their root mean square, so "
        "that units move as they matter; `adam` is the paper's AdamW, with log-alpha kept within ±log 100."
    )  # fmt: skip
    lr: float = opt(
        2.5, "Learning rate of log-alpha, which `sgd` divides by the steps until the gates settle: under a constant "
        "gradient a unit moves 8 to 10 times this in a run of any length.", ge=0
    )  # fmt: skip
    temperature: float = opt(0.1, "Temperature of the hard-concrete distribution (the paper: 2/3).", gt=0)
    noise: float = opt(0.1, "Scale of the sampling noise at the start (the paper: 1), which falls to a fifth until the "
                       "gates settle.", ge=0, le=1)  # fmt: skip

    def __post_init__(self):
        if not self.units:
            object.__setattr__(self, "units", list(DEFAULT_UNITS[self.shape]))

    @property
    def noise_end(self) -> float:
        """Scale of the sampling noise when the gates settle; where they never do, it stays."""
        return self.noise if self.settle == 1 else self.noise / 5

    @property
    def clamp(self) -> float:
        """Log-alpha is kept within ± this; 0: not clamped."""
        return math.log(100) if self.optimizer == "adam" else 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batches and learning rate."""

    steps: int = opt(0, "Optimizer steps; 0: `epochs` passes over the text.", ge=0)
    epochs: float = opt(7.0, "Passes over the text where `steps` is 0.", gt=0, le=10_000)
    batch_size: int = opt(16, "Sequences of an optimizer step over all ranks.", ge=1)
    micro_batch: int = opt(
        0, "Sequences of a forward pass on one rank, halved where memory runs out, with the same losses; 0: begin with "
        "as many as the planner finds room for.", ge=0
    )  # fmt: skip
    lora_lr: float = opt(
        0.0, "Peak learning rate of LoRA; 0: a hundredth of the root mean square of the weights that it updates, at "
        "another rank than 16 times √(16 / rank).", ge=0
    )  # fmt: skip
    lora_optimizer: Literal["scaled", "adamw"] = opt(
        "scaled", "`scaled` is AdamW on the gradient of each LoRA factor scaled by the other factor, B at four times "
        "the rate of A, with 3% warm-up and a cosine to a tenth; `adamw` (the paper) falls linearly to 0."
    )  # fmt: skip
    activation_checkpointing: bool = opt(False, "Each layer is computed again in the backward pass, to save memory.")
    deterministic: bool = opt(
        False, "A GPU takes only deterministic algorithms, and tile sizes that are not measured, so that two runs give "
        "the same bits there too (docs/determinism.md)."
    )  # fmt: skip
    rank_timeout: int = opt(600, "Seconds that a rank waits for the others before the run ends.", ge=10)


@dataclass(frozen=True)
class LoraConfig:
    """What is learned beside the gates."""

    targets: list[Projection] = opt(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Projections that get LoRA; none: gates alone are learned.",
    )
    rank: int = opt(16, "Rank of LoRA.", ge=1)
    alpha: float = opt(0.0, "LoRA's update is scaled by alpha / rank; 0: not scaled.", ge=0)
    refit: int = opt(
        112, "Extra ranks of down_proj through which the FFN units that stay replace those that leave, by least "
        "squares on the text and not trained; 0: off, as where no FFN units leave, down_proj has no LoRA or layers "
        "have experts.", ge=0
    )  # fmt: skip

    @property
    def scaling(self) -> float:
        """What LoRA's update is multiplied by."""
        return self.alpha / self.rank or 1.0


@dataclass(frozen=True)
class LossConfig:
    """What the student learns from its teacher and from the text."""

    kl_weight: float = opt(
        1.0, "Weight per token of the KL from the teacher (the paper's 0.1 at 512 tokens is 51.2): more keeps the "
        "student nearer to the model, less nearer to the text.", ge=0
    )  # fmt: skip
    temperature: float = opt(
        1.0, "Softmax temperature T of the KL, which is scaled by T squared (the paper: 2/3).", gt=0
    )
    label_weight: float = opt(
        1.0, "Weight of the cross entropy of the text's next token beside a teacher (the paper: 0).", ge=0
    )
    layer_weight: float = opt(
        0.0, "Weight of the mean squared error of each layer's output, summed over layers (the paper: 0.9).", ge=0
    )


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches a step."""

    mode: Literal["numerous", "intact", "none"] = opt(
        "numerous", "`numerous` takes earlier snapshots of the student and the intact model, `intact` the intact model "
        "alone, `none` the text alone."
    )  # fmt: skip
    interval: float = opt(0.01, "Sparsity between two snapshots.", gt=0, lt=1)
    lag: int = opt(
        20, "Smallest gap in sparsity to the teacher while sparsity rises, in intervals (the paper: 10); below it the "
        "intact model teaches.", ge=1
    )  # fmt: skip
    share: float = opt(
        0.4, "Largest sparsity of a teacher as a share of the student's (the paper: 1, no such limit).", gt=0, le=1
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run needs to go on where it stopped."""

    every: int = opt(
        0,
        "Steps between two checkpoints; 0: five minutes, or more where saving would take over 5% of the time.",
        ge=0,
    )
    keep: int = opt(2, "Checkpoints that are kept.", ge=1)


@dataclass(frozen=True)
class TrackingConfig:
    """Where one watches a run."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = opt(
        ["tensorboard"], "Where metrics go beside metrics.jsonl; empty: nowhere."
    )
    progress: bool = opt(True, "Progress bars are shown.")


@dataclass(frozen=True)
class RecoverConfig:
    """Training rungs of a ladder on."""

    ladder: list[float] = opt([], "Sparsities whose snapshots are trained on with their gates fixed.")
    steps: int = opt(0, "Optimizer steps for each; 0: 0.4 of the run's.", ge=0)


@dataclass(frozen=True)
class FinetuneConfig:
    """Training the student on instruction records."""

    data: str = opt(
        "", "File (.json, .jsonl, .parquet) of records with instruction, input, output; or messages; or prompt, "
        "completion."
    )  # fmt: skip
    sparsity: float = opt(0.0, "The run's snapshot at this sparsity is fine-tuned; 0: the final student.", ge=0, lt=1)
    template: Literal["auto", "chat", "alpaca"] = opt(
        "auto",
        "Prompts are worded by the tokenizer's chat template or as Alpaca's; `auto`: the first where there is one.",
    )
    seq_len: int = opt(1024, "Tokens of a window, which whole records are packed into.", ge=8)
    pack: bool = opt(True, "A window holds several records; false (the authors): one, padded.")
    steps: int = opt(0, "Optimizer steps; 0: `epochs` passes over the windows.", ge=0)
    epochs: float = opt(2.0, "Passes over the windows where `steps` is 0.", gt=0, le=10_000)
    batch_size: int = opt(16, "Windows of an optimizer step over all ranks.", ge=1)
    micro_batch: int = opt(0, "Windows of a forward pass on one rank, as train.micro_batch.", ge=0)
    lr: float = opt(0.0, "Peak learning rate; 0: half of what train.lora_lr is by default.", ge=0)
    lora_rank: int = opt(0, "Rank of LoRA, at least the run's, whose update is trained on; 0: the run's.", ge=0)
    distill: float = opt(
        0.0, "Weight per answer token of the KL from the intact model, beside the cross entropy.", ge=0
    )


@dataclass(frozen=True)
class DistillConfig:
    """Training the weights of the exported model's decoder."""

    steps: int = opt(
        0,
        "Optimizer steps; 0: as many as the run's. `submit` starts the stage where this is set, `run` also where it "
        "chooses the steps.",
        ge=0,
    )
    deepspeed: str = opt("", "As `deepspeed`, for this stage, which takes more memory; empty: that of the run.")


@dataclass(frozen=True)
class ExportConfig:
    """The small model that is written."""

    output: str = opt("", "Directory of the model; empty: `export` below the run's directory.")
    shape: ExportShape = opt("as_trained", "Shape of the model; `as_trained`: gates.shape of the run.")
    sparsity: float = opt(0.0, "The run's snapshot at this sparsity is exported; 0: the final student.", ge=0, lt=1)
    ladder: list[float] = opt(
        [], "A model is exported at each of these sparsities, and all are compared with the intact one."
    )
    source: Literal["newest", "pruned", "finetuned"] = opt(
        "newest", "The student as pruned or as fine-tuned; `newest`: fine-tuned where that is finished."
    )
    dtype: Literal["as_base", Dtype] = opt("as_base", "Number type of the weights.")
    gguf: Literal["none", "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"] = opt(
        "none", "A model.gguf for llama.cpp is written too, its matrices in this type; those with a k need "
        "`pip install llama-cpp-py-sync`."
    )  # fmt: skip
    push_to_hub: str = opt(
        "", "Repository of the Hugging Face hub (user/name) that the model is uploaded to, private where it is new; "
        "empty: none."
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig:
    """The report that compares models."""

    models: list[str] = opt(
        [], "Directories of the models; empty: the base model, the run's export and what `distill` made of that."
    )
    output: str = opt(
        "", "Directory of report.html, report.md and report.json; empty: `evaluate` below the run's directory."
    )
    text: list[str] = opt(
        [], "Texts for perplexity, each as `data.source`, such as WikiText-2; empty: the text of training."
    )
    protocol: Literal["own", "published"] = opt(
        "own", "`published` scores WikiText-2's raw test set (`evaluate.text`; empty: the hub's) in windows of 2,048 "
        "and 128 tokens and tasks zero-shot on all examples, as papers do, whatever the settings below say."
    )  # fmt: skip
    window: int = opt(2048, "Tokens of a perplexity window, with what the tokenizer puts first.", ge=8)
    blocks: int = opt(0, "Windows that are scored; 0: all.", ge=0)
    tasks: list[str] = opt(
        [], "Tasks of lm-eval: names on the hub, `paper` (the paper's seven), `local_mc`, or YAML files of your own."
    )
    task_limit: int = opt(0, "Examples of a task; 0: all.", ge=0)
    fewshot: int = opt(0, "Few-shot examples of a task.", ge=0)
    batch_sizes: list[int] = opt(
        [1, 8], "Sequences at once, one speed measurement each; none: no speed is measured.", ge=1
    )  # fmt: skip
    prompt_tokens: int = opt(256, "Tokens of a prompt of the speed measurement.", ge=1)
    new_tokens: int = opt(64, "Tokens that the speed measurement decodes.", ge=1)
    prompts: int = opt(
        32, "Prompts from the text that are continued greedily, to count continuations that loop, repeat themselves or "
        "agree with the first model's; 0: none.", ge=0
    )  # fmt: skip
    trust_remote_code: bool = opt(
        False, "Python code that comes with a model (auto_map) or a task file is run; no file can set this."
    )


@dataclass(frozen=True, repr=False)
class Config:
    """The run."""

    run_dir: str = opt("", "Directory of the run: settings, checkpoints, logs, results.")
    recipe: str = opt("default", "Settings to start from: the name of a recipe (paper, taylor, llama2-13b, …) or a "
                                 "YAML file.")  # fmt: skip
    seed: int = opt(0, "Seed of the data's order, of gate samples and of LoRA's start.", ge=0, lt=2**63)
    deepspeed: str = opt(
        "", "How ranks share the memory: zero2, zero3, zero3_hpz, zero3_offload, or a DeepSpeed JSON file; empty: "
        "every rank holds everything."
    )  # fmt: skip
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __repr__(self) -> str:
        """What differs from the defaults of the fields."""
        changed: dict[str, Any] = {}
        for name, default in vars(Config()).items():
            own, inner = getattr(self, name), vars(default) if is_dataclass(default) else None
            if inner is not None:
                changed |= {f"{name}.{key}": value for key, value in vars(own).items() if value != inner[key]}
            elif own != default:
                changed[name] = own
        return f"Config({', '.join(f'{key}={value!r}' for key, value in changed.items())})"


ASKED_EACH_TIME = (("evaluate", "trust_remote_code"),)
"""Fields that no file can set: a recipe or a run directory of someone else's must not allow itself to run code."""

STAGE_SECTIONS = {
    "prepare": ["model", "data", "finetune"],
    "prune": ["model", "data", "sparsity", "gates", "train", "lora", "loss", "teacher", "checkpoint", "tracking"],
    "recover": ["recover", "model", "train", "export", "checkpoint", "tracking"],
    "finetune": ["finetune", "model", "train", "loss", "export", "checkpoint", "tracking"],
    "export": ["export", "model", "evaluate", "tracking"],
    "distill": ["distill", "model", "train", "loss", "export", "checkpoint", "tracking"],
    "evaluate": ["evaluate", "model", "data", "export", "tracking"],
}
"""The sections each stage reads, in the order in which a user meets them; `--help` of a stage lists these."""
