"""Run configuration: frozen dataclasses filled from a recipe, a YAML file and `key.sub=value` overrides.

A user's mistake (unknown key, wrong type, value out of range) raises `UserError` with one line that names the key and
says how to mend it. `nuteprune STAGE --help` prints every field from its metadata.
"""

import sys

if sys.platform == "win32":  # signals, file locks and resource usage are POSIX's
    raise SystemExit("nuteprune runs on Linux and macOS. On Windows it runs inside WSL: wsl --install")

from nuteprune.config.fields import (
    ASKED_EACH_TIME,
    STAGE_SECTIONS,
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    EvaluateConfig,
    ExportConfig,
    ExportShape,
    FinetuneConfig,
    GateConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Projection,
    Shape,
    SparsityConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
    Unit,
)
from nuteprune.config.loading import (
    DS_CONFIGS,
    beyond_recipe,
    deepspeed_path,
    given_keys,
    load_config,
    read_entries,
    read_yaml,
    recipe_path,
)
from nuteprune.config.said import check_said
from nuteprune.config.values import describe, flatten, to_dict
