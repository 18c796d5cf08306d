"""Checkpoints of the Hugging Face hub by name, from the local cache or downloaded."""

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

SMALL_FILES = ["*.json", "chat_template.jinja"]
"""Patterns of config, index and tokenizer, which suffice to check all else before a download."""
WEIGHT_FILES = ["*.safetensors"]
"""Patterns of the weights."""


def is_name(weights: str) -> bool:
    """True for `owner/model` and `owner/model@revision`, the forms of a name on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", weights) is not None


def fetch(weights: str, patterns: list[str], key: str) -> Path:
    """The folder of a model in the hub's cache, after a download of the files that it lacks.

    Args:
        weights: Name of the model; a revision (branch, tag or commit) can follow after `@`.
        patterns: Patterns of the files to fetch.
        key: Key of the setting that holds the name, for errors.

    Raises:
        InputError: The model does not exist, is not open to this user, or is neither in the cache
            nor within reach.
    """
    name, _, revision = weights.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{key}={weights}: expected access to a gated model; accept its license on the hub and "
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
