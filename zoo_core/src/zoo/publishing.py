"""``zoo.push``: a saved folder to a repository on the Hub, by huggingface_hub's own upload."""

from __future__ import annotations

import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from zoo_registry import errors

from .saving import save

#: What belongs to a saved model; other files of its folder stay at home.
_PATTERNS = ("config.json", "README.md", "model*.safetensors", "model.safetensors.index.json")


def push(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    **save_options: Any,
) -> str:
    """Upload a model (or a folder that :func:`zoo.save` wrote) and return the name that loads it back, with its commit.

    ``repo_id``: "organisation/name", created when it does not exist (``private`` applies then). ``revision``: a branch;
    ``create_pr``: propose instead of writing. ``save_options``: those of ``zoo.save`` (``labels``, ``licence``,
    ``metrics``, ``notes``). The token is huggingface_hub's (``hf auth login`` or HF_TOKEN).

    >>> zoo.load(zoo.push(model, "me/vim_tiny.flowers", licence="mit"))

    Raises AccessDenied, HubUnavailable, and what ``zoo.save`` raises.
    """
    if repo_id.count("/") != 1:
        raise errors.BadName(f"{repo_id!r} is no repository; expected 'organisation/name'", name=repo_id)
    if not isinstance(model, nn.Module):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise errors.LocalFileMissing(
                f"{folder} holds no config.json; expected a folder that zoo.save wrote", path=str(folder)
            )
        if save_options:
            raise errors.BadArgument(
                f"{', '.join(save_options)}: these belong to zoo.save, and {folder} is saved already",
                argument=next(iter(save_options)),
                accepted=[],
            )
        return _upload(folder, repo_id, private, token, revision, create_pr, message)
    with tempfile.TemporaryDirectory() as work:
        folder = save(model, Path(work) / repo_id.rpartition("/")[2], **save_options)
        return _upload(folder, repo_id, private, token, revision, create_pr, message)


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from zoo_registry.hub import Access, HubFile, check_request, explain

    from . import __version__

    file, access = HubFile(repo_id, "model.safetensors", revision), Access(token=token)
    check_request(file, access)
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and any(fnmatch(f.name, p) for p in _PATTERNS)]
    operations = [CommitOperationAdd(f.name, _content(f, repo_id)) for f in files]
    api = HfApi(token=token, library_name="ssm-zoo", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id,
            operations,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or "Upload a model of the zoo of state-space models",
        )
    except (HfHubHTTPError, OSError) as error:
        explained = explain(error, file, access)
        if isinstance(explained, errors.AccessDenied):
            explained.add_note(f"while writing to {repo_id}: the token needs the right to write there")
        raise explained from error
    return f"hf-hub:{repo_id}@{done.oid}"


def _content(file: Path, repo_id: str) -> str | bytes:
    """The file, or the model card with the repository's name in it."""
    if file.name != "README.md":
        return str(file)
    text = file.read_text(encoding="utf-8")
    return text.replace("ORGANISATION/REPOSITORY", repo_id).encode()
