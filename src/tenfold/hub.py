"""Models by their id on the Hugging Face hub: `owner/name` becomes a directory of the local cache.

The cache, tokens and retries are huggingface_hub's, and so is the environment that steers them (HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT):
https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from tenfold.errors import TenfoldError, nearest

Part = Literal["model", "tokenizer", "config"]

_CONFIG = ("config.json",)
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "spiece.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
_TOKENIZER = (*_CONFIG, *TOKENIZER_FILES)
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_TORCH = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(/(?P<file>[^@]+\.gguf))?(@(?P<revision>.+))?", re.ASCII)
_NO_REPO = re.compile(r".*(--|\.\.).*|.*\.(git|gguf|json|model|safetensors)")
"""What the hub forbids in a name, and what is surely meant as a file here."""
_PART_NUMBER = re.compile(r"-\d{5}-of-(?=\d{5}\.gguf$)")


class _HubId(NamedTuple):
    text: str
    """As it was given."""
    repo: str
    revision: str | None
    file: str | None
    """The one GGUF file of the repository that is meant."""


def resolve(path_or_id: str | Path, part: Part = "model") -> Path:
    """A model's directory or file on this machine, fetched from the hub if need be.

    `path_or_id` is a path, or `owner/name` on the hub, or `owner/name/file.gguf` for a single file, either
    with `@revision` behind it. What is there as a path is returned as it is. `part` limits what is fetched
    to the files of the tokenizer or to the config. A snapshot that is whole in the cache is not looked up
    again: `hf download owner/name` brings a newer one.

    Raises TenfoldError if it is neither there nor can be fetched, saying what to download and where to
    put it.
    """
    path = Path(path_or_id)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise TenfoldError(f"{path}: {error.strerror}") from None
    hub_id = _parse(str(path_or_id))
    if hub_id is None:
        raise TenfoldError(f"{path}: no such file or directory")
    folder = _cached(hub_id, part) or _fetch(hub_id, part)
    return folder / hub_id.file if hub_id.file else folder


def _parse(text: str) -> _HubId | None:
    found = _ID.fullmatch(text)
    if found is None or _NO_REPO.fullmatch(found["repo"]):
        return None
    return _HubId(text, found["repo"], found["revision"], found["file"])


def _wanted(hub_id: _HubId, part: Part, files: list[str]) -> list[str]:
    """Those of a repository's files that are needed; of a GGUF model in parts, all of them."""
    ggufs = [name for name in files if name.endswith(".gguf")]
    if hub_id.file:
        if hub_id.file not in ggufs:
            raise TenfoldError(f"{hub_id.repo} has no file {hub_id.file}{nearest(hub_id.file, ggufs)}")
        return _matching(ggufs, (_PART_NUMBER.sub("-?????-of-", hub_id.file),))
    if "config.json" not in files:
        hint = f"; name one of its GGUF files: {', '.join(ggufs[:20])}" if ggufs else ""
        raise TenfoldError(f"{hub_id.repo} has no config.json{hint}")
    patterns = {"config": _CONFIG, "tokenizer": _TOKENIZER, "model": _TOKENIZER + _SAFETENSORS}[part]
    if part == "model" and not _matching(files, _SAFETENSORS):
        patterns += _TORCH
    return _matching(files, patterns)


def _matching(files: list[str], patterns: tuple[str, ...]) -> list[str]:
    """In the folders that the patterns name only, without Mistral's second copy of its weights."""
    return [
        name
        for name in files
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
        and not name.startswith("consolidated")
    ]


def _cached(hub_id: _HubId, part: Part) -> Path | None:
    """The snapshot in the cache, if all that is needed of it is there."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    repo, revision = hub_id.repo, hub_id.revision
    try:
        files = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
        wanted = _wanted(hub_id, part, files)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, TenfoldError):
        return None  # where this commit lacks something, a newer one may have it


def _fetch(hub_id: _HubId, part: Part) -> Path:
    """Download what is needed, with progress bars on stderr."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repo, revision = hub_id.repo, hub_id.revision
    try:
        # The one request whose time limit we set: snapshot_download's own have none.
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        wanted = _wanted(hub_id, part, [file.rfilename for file in info.siblings or []])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except TenfoldError:
        raise
    except Exception as error:  # its transports raise types of their own
        folder = _cached_unlisted(hub_id)
        if folder is None:
            raise TenfoldError(_problem(hub_id, error)) from None
        return folder


def _cached_unlisted(hub_id: _HubId) -> Path | None:
    """A snapshot that another program cached file by file, and so without the list of what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / (hub_id.file or "config.json")).exists() else None


def _problem(hub_id: _HubId, error: Exception) -> str:
    """What went wrong, in words, and the way round it."""
    from huggingface_hub import constants, errors

    home, status = constants.ENDPOINT, 0
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id.repo} is gated: accept its terms at {home}/{hub_id.repo}, then set HF_TOKEN"
            " or run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id.repo} has no revision {hub_id.revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id.text}: no such file or directory, nor a repository at {home} that you may see"
            " (if it is private, set HF_TOKEN or run `hf auth login`)"
        )
    if status in (401, 403):
        return f"{hub_id.repo}: {home} refused the access token; check HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return _by_hand(hub_id, f"cannot be fetched from {home} ({reason})")


def _by_hand(hub_id: _HubId, failure: str) -> str:
    from huggingface_hub import constants

    file = f" {hub_id.file}" if hub_id.file else ""
    revision = f" --revision {hub_id.revision}" if hub_id.revision else ""
    needed = hub_id.file or "config.json, tokenizer files, *.safetensors"
    return (
        f"{hub_id.text}: no such file or directory, not in the cache {constants.HF_HUB_CACHE}, and {failure}:"
        f" where there is network, run `hf download {hub_id.repo}{file}{revision} --local-dir DIR`"
        f" (needed: {needed}), and give DIR{file and f'/{hub_id.file}'} here"
    )
