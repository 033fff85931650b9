"""The Hugging Face hub: a quick answer where it cannot be reached, and a model's files in its cache."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from nuteprune.errors import UserError, first_line

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds in which the hub, or a name server, has to answer."""
WEIGHTS, PICKLED = "*.safetensors", "*.bin"
POINTER = b"version https://git-lfs"
"""How a file begins that git-lfs has put in the place of a large one."""
FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
TOKENIZERS = ["*token*", "vocab.*", "*.model", "*.tiktoken"]
"""Files of which a directory with a tokenizer has one."""
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
        _last = time.monotonic(), _ask()
    _go(offline=bool(_last[1]))
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


def check_model(path: str) -> Path:
    """The directory of a model's config.json, that of a hub id in the hub's cache; imports no torch.

    Raises:
        UserError: no path, no such directory or model, or a directory that holds something else than a model to prune.
    """
    if not path:
        raise UserError("model.path is empty: set it to a model directory or a hub id")
    if Path(path).exists():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent  # a config.json
        adapter = (Path(path) / "adapter_config.json").is_file()
    else:
        try:
            validate_repo_id(path)
        except HFValidationError:
            raise UserError(f"model.path {path}: there is no such directory") from None
        why, adapter = unreachable(), False
        try:
            with suppress(EntryNotFoundError):
                adapter = bool(hf_hub_download(path, "adapter_config.json"))
            folder = Path(path) if adapter else Path(hf_hub_download(path, "config.json")).parent
        except Exception as error:  # the client lets through what its HTTP library raises
            raise UserError(
                f"model.path {path}: neither a directory here nor a model the hub would give "
                f"({why or first_line(error)})"
            ) from None
    if adapter:
        raise UserError(
            f"model.path {path}: a LoRA adapter lies there (adapter_config.json): merge it into its model with "
            "merge_and_unload() of peft, and prune what that saves"
        )
    if folder != Path(path):
        return folder
    for file in (folder / "config.json", folder / "tokenizer.json", *weight_files(folder)):
        if file.is_file() and _begins(file, POINTER):
            raise UserError(
                f"model.path {path}: {file.name} is a pointer of git-lfs, not the file: run `git lfs pull` there"
            )
    if not (folder / "config.json").is_file():
        gguf = next(folder.glob("*.gguf"), None)
        also = f" but a GGUF: take the model that {gguf.name} was made from, as safetensors" if gguf else ""
        raise UserError(f"model.path {path}: no readable config.json there{also}")
    with suppress(OSError, ValueError, LookupError, TypeError):  # told where it is read
        kind, record = (json.loads((folder / name).read_bytes()) for name in ("config.json", "nuteprune.json"))
        if kind["model_type"].startswith("nuteprune_"):
            raise UserError(
                f"model.path {path}: an export whose layers differ in width, which cannot be pruned again: prune its "
                f"base {record['base']} at a higher sparsity"
            )
    return folder


def check_tokenizer(path: str) -> None:
    """Raise `UserError` for a directory of a model without the files of a tokenizer."""
    if Path(path).is_dir() and not any(file.is_file() for name in TOKENIZERS for file in Path(path).glob(name)):
        raise UserError(
            f"model.path {path}: no tokenizer there: copy tokenizer.json and tokenizer_config.json of the model that "
            "it was made from"
        )


def _begins(file: Path, head: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(head)) == head


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
