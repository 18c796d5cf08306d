"""Checkpoints of the Hugging Face hub by name: from its cache on this machine, else downloaded."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flash.errors import InputError

SMALL = ["*.json", "chat_template.jinja"]
"""Config, index and tokenizer: enough to check everything before the weights are fetched."""
WEIGHTS = ["*.safetensors"]


def is_name(weights: str) -> bool:
    """Whether this can be a name on the hub: `owner/model` or `owner/model@revision`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", weights) is not None


def fetch(weights: str, patterns: list[str], key: str) -> Path:
    """The folder in the hub's cache that holds the files, those that were missing downloaded.

    Args:
        weights: Name, with a revision (branch, tag or commit) after `@` if not the newest.
        patterns: Which files.
        key: Setting that named it, for errors.

    Raises:
        InputError: No such model, no permission, or no network and not in the cache.
    """
    name, _, revision = weights.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{key}={weights}: expected access to a gated model; accept its licence on the hub and "
            "run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{key}={weights}: expected a folder or a model on the hub, found neither; check the "
            "name, or run `hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(
            f"{key}={weights}: expected a folder or a model in the hub's cache, and the hub cannot "
            f"be reached; run `hf download {name}` where there is a network, or name a folder"
        ) from error
