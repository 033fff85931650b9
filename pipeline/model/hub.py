"""The Hugging Face hub: a quick answer where it cannot be reached, and a model's files in its cache."""

from __future__ import annotations

import logging
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session

from nuteprune.errors import UserError, first_line

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds in which the hub, or a name server, has to answer."""
WEIGHTS, PICKLED = "*.safetensors", "*.bin"
FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
TWICE = ["consolidated*", "original/*"]
"""Weights that some repositories hold a second time, in a form that transformers does not read."""
_last: tuple[float, str] | None = None
"""When the hub was asked, and what `unreachable` answered then."""


def unreachable() -> str:
    """Why the hub cannot be asked, for a message; empty where it answers, or where the user has set HF_HUB_OFFLINE.

    Its client asks six times within half a minute, for each file, before it looks into its cache. So it is asked once;
    if nothing comes back in `PATIENCE` seconds, this process goes on offline, with what the cache holds.
    """
    global _last
    if _last is None and constants.HF_HUB_OFFLINE:
        return ""
    if _last is None or time.monotonic() - _last[0] > 60:
        _go(offline=False)
        why = _ask()
        _go(offline=bool(why))
        _last = time.monotonic(), why
    return _last[1]


def _ask() -> str:
    failed = [f"no answer in {PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            failed.clear()
        except Exception as error:  # the client's HTTP library, and so its errors, change with its version
            failed[:] = [first_line(error)]

    asking = threading.Thread(target=ask, daemon=True)  # a name server can keep it for longer than its timeout
    asking.start()
    asking.join(PATIENCE)
    return f"{constants.ENDPOINT} cannot be reached: {failed[0]}" if failed else ""


def _go(offline: bool) -> None:
    constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:  # it takes the hub's word when it is imported, and keeps it
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline


def weight_files(folder: Path) -> list[Path]:
    """The files of a directory from which transformers reads weights; pickled ones where there are no others."""
    for pattern in (WEIGHTS, PICKLED):
        files = [file for file in folder.glob(pattern) if not any(fnmatch(file.name, twice) for twice in TWICE)]
        if files:
            return files
    return []


def fetch(path: str) -> Path:
    """The directory of a model's files, downloaded into the hub's cache where `path` is a hub id.

    Raises:
        UserError: there is no such directory or model, or it cannot be downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    why = unreachable()
    if not (why or constants.HF_HUB_OFFLINE):
        log.info("%s: fetching what %s lacks of it", path, constants.HF_HUB_CACHE)
    try:
        folder = Path(snapshot_download(path, allow_patterns=[*FILES, WEIGHTS], ignore_patterns=TWICE))
        if not any(folder.glob(WEIGHTS)):
            snapshot_download(path, allow_patterns=[PICKLED], ignore_patterns=TWICE)
    # The client lets through what its HTTP library raises.
    except Exception as error:
        raise UserError(
            f"model.path {path}: neither a directory here nor a model the hub would give ({why or first_line(error)})"
        ) from None
    return folder
