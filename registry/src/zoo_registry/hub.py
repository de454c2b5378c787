"""One file from the Hub: found in the cache or transferred by huggingface_hub, checked, and every failure explained.

huggingface_hub does the transfer, the cache, tokens, progress bars and resuming within a download; only its public
functions are used, and it is imported when bytes are needed. Its environment variables hold (HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _disk as disk
from .errors import (
    AccessDenied,
    BadName,
    FileNotInRepo,
    HashMismatch,
    HubTimeout,
    HubUnavailable,
    IncompleteDownload,
    NotCached,
    RepoHidden,
    RepoNotFound,
    RevisionNotFound,
    StoreError,
)

LIBRARY = "ssm-zoo"


@dataclass(frozen=True)
class HubFile:
    """What is asked for. ``name`` is the zoo's name of the checkpoint, for messages."""

    repo_id: str
    filename: str
    revision: str | None = None
    sha256: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.filename} of {self.repo_id} at {self.revision or 'main'}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "filename": self.filename, "revision": self.revision, "name": self.name}

    @property
    def command(self) -> str:
        """What fetches the file beforehand, on a machine with a network."""
        at = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repo_id} {self.filename}{at}"


@dataclass(frozen=True)
class Access:
    """How to get at the Hub: the arguments that all functions of the store share."""

    cache_dir: str | Path | None = None
    token: bool | str | None = None
    local_files_only: bool = False
    force_download: bool = False
    verify: bool = False
    newest: bool = False  #: ask the Hub whether a file of a branch has changed, though it is in the cache


def get(file: HubFile, access: Access = Access()) -> Path:
    """The path of a file in the cache, transferred when it is not there, never one with a wrong digest.

    A file that is in the cache is served without asking the Hub. Its digest (from the card, or the sha256 that the
    Hub names the file by) is checked once; a cached file that is damaged is moved aside and fetched again, one that
    is wrong on arrival is moved aside and refused (HashMismatch). Raises BadName for what cannot be a repository or a
    file in one.
    """
    check_request(file, access)
    path = None if access.force_download else cached(file, access.cache_dir)
    offline = access.local_files_only or _offline()
    if path is not None and access.newest and not offline and not is_commit(file.revision):
        try:
            return _transfer(file, access)
        except HubUnavailable as error:
            disk.log.warning("%s. Using the copy in the cache, which may be older.", error)
    if path is not None:
        try:
            return check(path, file, again=access.verify)
        except HashMismatch as damaged:
            if offline:
                raise
            disk.log.warning("%s Fetching it again.", damaged)
    return _transfer(file, access)


def check_request(file: HubFile, access: Access) -> None:
    """Refuse what no Hub could answer, before it is asked. A token is never part of a message."""
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(file.repo_id)
    except hub.HFValidationError as error:
        raise BadName(f"{file.repo_id!r} is no repository: {_first_line(error)}", **file.facts) from error
    parts = file.filename.split("/")
    if not file.filename or "\\" in file.filename or any(part in ("", ".", "..") for part in parts):
        raise BadName(
            f"{file.filename!r} is no file of a repository; expected its path there, as model.safetensors or a/b.bin",
            **file.facts,
        )
    if file.sha256 is not None and not _is_sha256(file.sha256.lower()):
        raise BadName(f"sha256 is {file.sha256!r}; expected 64 hexadecimal digits", **file.facts)
    if isinstance(access.token, str) and not re.fullmatch(r"[\x21-\x7e]+", access.token):
        raise AccessDenied(
            "the token is empty or holds spaces, line ends or letters beyond ASCII, which no token does; copy it again",
            **file.facts,
        )


def cached(file: HubFile, cache_dir: str | Path | None = None) -> Path | None:
    """The file in the cache, or None. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    cache = None if cache_dir is None else str(disk.hub_cache(cache_dir))
    found = try_to_load_from_cache(file.repo_id, file.filename, cache_dir=cache, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _transfer(file: HubFile, access: Access) -> Path:
    from huggingface_hub import hf_hub_download

    if access.local_files_only or _offline():
        raise _not_cached(file, access)
    cache = disk.hub_cache(access.cache_dir)
    facts = _metadata(file, access)
    free = disk.free_bytes(cache)
    if facts.size is not None and free is not None and free < facts.size:
        raise disk.disk_full(cache, needed=facts.size, what=file.filename)
    try:
        path = hf_hub_download(
            file.repo_id,
            file.filename,
            revision=file.revision,
            cache_dir=str(cache),
            token=access.token,
            force_download=access.force_download,
            library_name=LIBRARY,
            library_version=_version(),
        )
    except Exception as error:
        raise explain(error, file, access) from error
    _sweep(Path(path))
    etag = facts.etag if _is_sha256(facts.etag) else None
    return check(Path(path), file, arrived=True, etag=etag, again=access.force_download)


def _sweep(path: Path) -> None:
    """Remove what killed downloads left in this repository. huggingface_hub gives each its own temporary file, never
    takes one up again and never removes one; a day without a write means that nobody works on it."""
    repo = disk.repo_folder(path)
    for stale in (repo / "blobs").glob("*.incomplete") if repo else ():
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 86400:
                stale.unlink()


def _metadata(file: HubFile, access: Access) -> Any:
    """Size, etag and commit. Asked here, before the transfer, because hf_hub_download folds every failure of this
    question into one exception, and waits for half a minute before it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.repo_id, file.filename, revision=file.revision)
    for attempt in (1, 2):
        try:
            facts = get_hf_file_metadata(url, token=access.token, library_name=LIBRARY, library_version=_version())
            break
        except Exception as error:
            explained = explain(error, file, access, asking=True)
            wait = max(_retry_after(error) or 0, 1)
            if attempt == 2 or type(explained) is not HubUnavailable or wait > 10:
                raise explained from error
            disk.log.info("%s; trying once more", explained)
            time.sleep(wait)
    if facts.commit_hash is None or facts.etag is None:
        raise HubUnavailable(
            f"the answer for {url} does not come from a Hub (no commit or etag in it). Check HF_ENDPOINT, the proxy, "
            "or the sign-in page of the network",
            **file.facts,
        )
    return facts


def _version() -> str:
    from . import __version__

    return __version__


def is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _is_sha256(text: str | None) -> bool:
    return text is not None and re.fullmatch("[0-9a-f]{64}", text) is not None


# -- checking ----------------------------------------------------------------------------------------------------


def check(path: Path, file: HubFile, *, arrived: bool = False, etag: str | None = None, again: bool = False) -> Path:
    """``path``, if its bytes are the right ones; otherwise they are moved aside and HashMismatch is raised.

    The digest comes from the card, else from the Hub, which names large files by their sha256 (``etag``; in the
    cache, the name of the blob; in a cache without symbolic links, what was recorded when the file came). A file with
    no known digest passes.
    """
    try:
        blob = path.resolve(strict=True)
        expected = (
            (file.sha256.lower() if file.sha256 else None) or etag or (blob.name if _is_sha256(blob.name) else None)
        )
        if expected is None and not arrived:
            expected = disk.recorded_digest(path)
        if expected is None:
            return path
        received = disk.digest(path, again=again)
    except FileNotFoundError as error:
        if path.is_symlink():
            path.unlink(missing_ok=True)  # its blob is gone: another process has just moved it aside
        raise HashMismatch(
            f"{file} was removed from the cache while it was checked (another process found it wrong); load again",
            path=str(path),
            expected=file.sha256 or etag,
            received=None,
            **file.facts,
        ) from error
    if received == expected:
        return path
    aside = _move_aside(path, blob, received)
    if aside is None:
        where = f"it could not be moved aside ({blob}) and is not used"
    else:
        where = f"it was moved aside to {aside} and is never used"
    when = "what the Hub sent" if arrived else "the file in the cache"
    cause = "the card" if file.sha256 else "the Hub"
    advice = "" if file.revision else " The card pins no revision: the authors may have replaced the file."
    raise HashMismatch(
        f"{file}: {when} is not the expected file: sha256 expected {expected} (from {cause}), received {received}; "
        f"{where}.{advice}",
        path=str(aside or blob),
        expected=expected,
        received=received,
        **file.facts,
    )


def _move_aside(path: Path, blob: Path, received: str) -> Path | None:
    """Take a wrong file out of the cache. None when the cache cannot be written."""
    try:
        folder = disk.writable_home(path) / "wrong"
        folder.mkdir(exist_ok=True)
        aside = folder / f"{path.name}.{received[:12]}"
        shutil.move(str(blob), str(aside))
        if path != blob:
            path.unlink(missing_ok=True)
    except OSError as error:
        disk.log.debug("%s cannot be moved aside: %s", blob, error)
        return None
    disk.forget_digest(path, str(blob))
    return aside


# -- explaining --------------------------------------------------------------------------------------------------


def _not_cached(file: HubFile, access: Access) -> NotCached:
    why = "HF_HUB_OFFLINE is set" if _offline() else "local_files_only was asked for"
    cache = disk.hub_cache(access.cache_dir)
    return NotCached(
        f"{_what(file)} is not in the cache and {why}. Searched {cache} for {file.filename} of {file.repo_id} at "
        f"revision {file.revision or 'main'}. Fetch it beforehand, with a network: {file.command}",
        cache_dir=str(cache),
        command=file.command,
        **file.facts,
    )


def _what(file: HubFile) -> str:
    return file.name or file.filename


def explain(error: Exception, file: HubFile, access: Access, *, asking: bool = False) -> StoreError:
    """The zoo's error for whatever huggingface_hub raised, ``asking`` about the file or transferring it."""
    from huggingface_hub import errors as hub

    if isinstance(error, StoreError):
        return error
    # hf_hub_download hides what happened behind "not found locally"; the cause says it.
    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__, file, access, asking=True)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return _not_cached(file, access)
    if isinstance(error, hub.LocalTokenNotFoundError):
        return AccessDenied(
            "token=True was given and there is no token; log in with `hf auth login` or set HF_TOKEN", **file.facts
        )

    facts: dict[str, Any] = dict(file.facts)
    response = getattr(error, "response", None)
    status = facts["status"] = getattr(response, "status_code", None)
    page = f"https://huggingface.co/{file.repo_id}"
    name = f"{file.name}: " if file.name else ""
    if isinstance(error, (hub.GatedRepoError, hub.DisabledRepoError)):
        if isinstance(error, hub.DisabledRepoError):
            text = f"{name}the Hub has disabled {file.repo_id} ({status}); see {page}"
        else:
            text = (
                f"{name}{file.repo_id} is gated ({status}): accept its terms at {page}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        return AccessDenied(text, **facts)
    if isinstance(error, hub.RepositoryNotFoundError):
        text = f"{name}the Hub has no repository {file.repo_id} ({status})"
        if status in (401, 403):
            return RepoHidden(
                f"{text}, or it is private and the token has no access to it: log in with `hf auth login` or set "
                f"HF_TOKEN; see {page}",
                **facts,
            )
        return RepoNotFound(f"{text}; it was renamed or removed, see {page}", **facts)
    if isinstance(error, hub.RevisionNotFoundError):
        return RevisionNotFound(
            f"{name}{file.repo_id} has no revision {file.revision!r} ({status}); its history is at {page}/commits/main",
            **facts,
        )
    if isinstance(error, hub.EntryNotFoundError) and status is not None:
        return FileNotInRepo(
            f"{name}{file.repo_id} has no file {file.filename!r} at revision {file.revision or 'main'} ({status}); its "
            f"files are at {page}/tree/{file.revision or 'main'}",
            **facts,
        )
    if status is not None:
        return _explain_status(int(status), error, file, facts, name)
    return _explain_transfer(error, file, access, facts, name, asking)


def _explain_status(status: int, error: Exception, file: HubFile, facts: dict[str, Any], name: str) -> StoreError:
    if status in (401, 403):
        storage = _other_host(error)
        if storage:
            return AccessDenied(
                f"{name}{storage}, where the Hub keeps large files, refuses {file} ({status}): a proxy or firewall may "
                "block it; try again, or fetch the file elsewhere and pass checkpoint=",
                **facts,
            )
        return AccessDenied(
            f"{name}the Hub refuses {file} ({status}): the token is wrong or lacks the right to read it. Log in with "
            "`hf auth login` or set HF_TOKEN",
            **facts,
        )
    if status == 404:
        return FileNotInRepo(f"{name}the Hub does not have {file} (404)", **facts)
    if status == 429:
        seconds = _retry_after(error)
        wait = "a while" if seconds is None else f"{seconds} s"
        return HubUnavailable(
            f"{name}the Hub asks to wait {wait} before sending {file} (429, too many requests); try again then. Who is "
            "logged in (`hf auth login`, HF_TOKEN) may ask more often",
            **facts,
        )
    kind = "has a fault of its own" if status >= 500 else "refuses the request"
    return HubUnavailable(
        f"{name}the Hub {kind} ({status}) for {file}; try again later, or fetch it elsewhere and pass checkpoint=",
        **facts,
    )


def _explain_transfer(
    error: Exception, file: HubFile, access: Access, facts: dict[str, Any], name: str, asking: bool
) -> StoreError:
    """Errors without an answer of the Hub. The HTTP library differs between releases of huggingface_hub, so its
    exceptions are told apart by name."""
    cache = disk.hub_cache(access.cache_dir)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if disk.is_full(error):
        return disk.disk_full(cache, what=file.filename)
    if disk.is_read_only(error) or (
        isinstance(error, OSError) and isinstance(error, (NotADirectoryError, FileExistsError))
    ):
        return disk.read_only(cache, error)
    there = cached(file, access.cache_dir) is not None
    where = f"It is not in the cache {cache}; revision {file.revision or 'main'}"
    beforehand = (
        "HF_HUB_OFFLINE=1 does not ask the Hub" if there else f"{where}. To fetch it beforehand: {file.command}"
    )
    from huggingface_hub import constants

    if kinds & {"TimeoutException", "Timeout", "TimeoutError"}:
        return HubTimeout(
            f"{name}{constants.ENDPOINT} did not answer in time for {file}. {beforehand}; HF_HUB_ETAG_TIMEOUT and "
            "HF_HUB_DOWNLOAD_TIMEOUT (seconds) wait longer",
            **facts,
        )
    broken_off = kinds & {"RemoteProtocolError", "ReadError"} or "Consistency check failed" in str(error)
    if broken_off and not asking:
        return IncompleteDownload(
            f"{name}the transfer of {file} ended before the whole file had come ({_first_line(error)}); nothing was "
            "kept. Load again to start over",
            **facts,
        )
    if kinds & {"ConnectError", "NetworkError", "ProxyError", "ConnectionError", "TransportError"}:
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            return HubUnavailable(
                f"{name}the environment variable HF_ENDPOINT is {constants.ENDPOINT!r}; expected an address that "
                "begins with https:// or http://, or none for the Hub's own",
                **facts,
            )
        through = _proxies()
        why = f"{_first_line(error) or type(error).__name__}{f'; {through}' if through else ''}"
        tail = "" if there else "; HF_HUB_OFFLINE=1 does not try"
        return HubUnavailable(
            f"{name}{constants.ENDPOINT} cannot be reached for {file} ({why}). {beforehand}{tail}", **facts
        )
    return StoreError(f"{name}{file} cannot be had: {type(error).__name__}: {_first_line(error)}", **facts)


def _retry_after(error: BaseException) -> int | None:
    """The seconds that an answer asks to wait, where it says so in seconds."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    said = headers.get("Retry-After", "")
    return int(said) if said.isdigit() else None


def _other_host(error: BaseException) -> str | None:
    """The host that an answer came from, if that is not the Hub itself."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    url = getattr(getattr(error, "response", None), "url", None)
    host = urlsplit(str(url)).hostname if url is not None else None
    return host if host and host != urlsplit(constants.ENDPOINT).hostname else None


def _proxies() -> str:
    """What the environment says of proxies, without their passwords."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    proxy = getproxies().get(urlsplit(constants.ENDPOINT).scheme) or getproxies().get("all")
    return f"through the proxy {proxy.rpartition('@')[2]}" if proxy else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
