"""The log on stderr, and what libraries say beside it."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from nuteprune.runs.words import plain


class PlainFormatter(logging.Formatter):
    """Names of files and models in a log cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return plain(super().format(record))


def quiet_libraries() -> None:
    """`start_log` and `hush`, for programs that import torch anyway."""
    start_log()
    hush()


def start_log() -> None:
    """Our own log on stderr; of the libraries only warnings and worse."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("nuteprune").setLevel(logging.INFO)


def hush() -> None:
    """Keep libraries from telling what is no concern of a user; imports torch and transformers."""
    # DeepSpeed calls a name that torch has renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.enable_progress_bars()  # which that switched off too; they show on a terminal only
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which transformers imports, warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def no_bar(shown: bool = True) -> bool:
    """`disable` of a progress bar: bars are for a terminal or a notebook, and fill a log file with returns."""
    return not (shown and (sys.stderr.isatty() or "ipykernel" in sys.modules))
