"""Models by their id on Hugging Face's hub, downloaded by huggingface_hub into its cache. A local
folder of that name takes precedence.
"""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Configs, weights, and the files of tokenizers and processors. Pickles and other frameworks'
# weights are not downloaded.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_folder(
    path_or_id: str | os.PathLike, subfolder: str | os.PathLike = "", **options: Any
) -> Path:
    """The folder (or file) of a model: the local path, else the model of that id on the hub, which
    is downloaded.

    Args:
        path_or_id: a path, or "organization/name".
        subfolder: the model's folder inside.
        options: of the hub: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: neither exists; or the hub cannot be reached, has no such model or
            requires a login.
        ValueError: path is empty, or `subfolder` is outside the folder.
    """
    if path_or_id == "":  # Path("") is the current folder
        raise ValueError("path is empty; give a model folder, a GGUF file or a model id on the hub")
    inner = Path(subfolder or "")
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"subfolder must lie inside the model folder, got {str(subfolder)!r}")
    if Path(path_or_id).exists() or not _ID.fullmatch(str(path_or_id)):
        return Path(path_or_id) / inner
    return (
        download(
            str(path_or_id),
            [f"{inner}/{pattern}" for pattern in PATTERNS] if subfolder else PATTERNS,
            **options,
        )
        / inner
    )


def download(
    model_id: str, patterns: list[str] | tuple[str, ...] = PATTERNS, **options: Any
) -> Path:
    """Download a model's files from the hub.

    Args:
        model_id: "organization/name".
        patterns: patterns of the files.
        options: of `huggingface_hub.snapshot_download`. With `local_dir`, files go there instead
            of into the cache, including Meta's original/tokenizer.model, which some scripts read.

    Returns:
        The folder of the files.

    Raises:
        FileNotFoundError: as `find_folder`; the message says what to do.
    """
    absent = (
        "" if "local_dir" in options else f"there is no folder {model_id!r} here, and "
    )  # without local_dir, a local folder was looked for first
    page = f"https://huggingface.co/{model_id}"
    ignored = ["original/*"]  # Meta's own files: the same weights again
    try:
        if (
            "local_dir" in options
            # If the revision is already cached, snapshot_download returns it even when the hub
            # refuses access.
        ):
            model_info(model_id, revision=options.get("revision"), token=options.get("token"))
            patterns, ignored = (
                (*patterns, "original/tokenizer.model"),
                ["original/*.json", "original/*.safetensors"],
            )
        return Path(
            snapshot_download(
                model_id, allow_patterns=list(patterns), ignore_patterns=ignored, **options
            )
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{model_id} is gated: accept its license at {page} and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        hint = (
            f"if it is private or gated, accept its license at {page} and log in with "
            "`hf auth login`"
        )
        raise FileNotFoundError(
            f"{absent}no such model on the hub: {model_id!r}; {hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{model_id} has no revision {options.get('revision')!r} on the hub"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{absent}the cache does not have the model {model_id!r}; the hub was not asked or "
            "cannot be reached (offline, or "
            "local_files_only)"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{model_id} cannot be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    except (ValueError, OSError):  # an invalid id, or the disk
        raise
    except Exception as error:  # connection errors, of the HTTP library's classes
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise FileNotFoundError(f"{model_id} cannot be fetched from the hub: {reason}") from error
