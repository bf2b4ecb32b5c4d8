"""Send files to the hub: one commit to a repository that is created if it does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from clair.core.errors import UserError, one_line


def sending_nothing(files: int, name: str, *, private: bool) -> str:
    """The last line of a push that only shows its files."""
    visibility = "private" if private else "public"
    return f"nothing was sent; add --yes to send these {files} files to {name} ({visibility})"


def push_files(
    files: Mapping[str, Path | bytes], name: str, *, kind: Literal["dataset", "model"], private: bool, message: str
) -> str:
    """Send `files`, by their path in the repository, to `org/name` with the hub library's token. Returns the URL.

    Raises UserError if there is no token, if the hub refuses it, or if `private` is set and the repository exists and
    is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if get_token() is None:
        raise UserError(f"cannot push to {name}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        if private and not api.repo_info(name, repo_type=kind).private:
            raise UserError(f"{name} exists already and is public; choose another name, or make it private on the hub")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, operations, repo_type=kind, commit_message=message)
    except UserError:
        raise
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"cannot push to {name}: {one_line(error)}") from error
    return str(url)
