"""The export stage: a finished run's student, or a snapshot, or a ladder of them, as small Hugging Face models."""

from __future__ import annotations

from pathlib import Path

from nuteprune.config import Config
from nuteprune.evaluation import ladder
from nuteprune.exporting.small import export_model


def run(config: Config) -> Path:
    """Export one model, or with `export.ladder` several and their comparison; returns the directory.

    Raises:
        UserError, ExportError: as of `export_model`; or a rung that the run never reached.
    """
    return ladder.run(config) if config.export.ladder else export_model(config)


def summary(config: Config, result: Path) -> str:
    """What the command line prints at the end."""
    if config.export.ladder:
        return f"{(result / 'ladder.md').read_text(encoding='utf-8')}\nladder: {result}"
    return f"exported model: {result}\nnext: nuteprune evaluate {config.run_dir}"
