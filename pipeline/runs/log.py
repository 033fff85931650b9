"""The log on stderr."""

from __future__ import annotations

import logging
import os
import warnings

from nuteprune.runs.words import plain


class PlainFormatter(logging.Formatter):
    """Names of files and models in a log cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return plain(super().format(record))


def quiet_libraries() -> None:
    """Our own log on stderr; of the libraries only warnings and worse."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("nuteprune").setLevel(logging.INFO)
    # DeepSpeed calls a name that torch has renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here, so that --help answers at once.
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
