"""A finished export on the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nuteprune.config import ExportConfig
from nuteprune.errors import UserError, first_line
from nuteprune.runs.checkpoint import CheckpointError, recorded, verify

log = logging.getLogger(__name__)


def check_repository(config: ExportConfig) -> None:
    """Raise `UserError` where `config.push_to_hub` can be no repository's name."""
    try:
        if config.push_to_hub:
            validate_repo_id(config.push_to_hub)
    except HFValidationError as error:
        raise UserError(f"export.push_to_hub {config.push_to_hub}: {first_line(error)}") from None


def push(directory: Path, config: ExportConfig) -> str:
    """Upload an export to the repository `config.push_to_hub`, made where it does not exist; returns its address.

    Only the files of its manifest go there: not what else lies in the directory, or is linked from it.

    Raises:
        UserError: the export is damaged, or the hub cannot be reached or refuses (no token, no right to write, …).
    """
    repo = config.push_to_hub
    try:
        verify(directory)
        names = [glob.escape(name) for name in recorded(directory)]
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, allow_patterns=names,
                          commit_message="Pruned with NutePrune")  # fmt: skip
    except CheckpointError as error:
        raise UserError(f"{error}: export again before it is pushed") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        token = get_token()
        raise UserError(f"export.push_to_hub {repo}: {reason.replace(token, '***') if token else reason}") from None
    log.info("pushed %s to %s", directory, address)
    return str(address)
