"""A parcel sent to a repository of the Hub, in one commit: it is there whole, or not at all.

The token is where huggingface_hub looks for one (`hf auth login`, HF_TOKEN); it is given to nobody else and printed
nowhere. What was sent before a connection broke is not sent again: the Hub knows it by its checksum.
Not here: what goes (parcel.py).
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

from llmq import __version__
from llmq.checkpoint.hub import is_repository
from llmq.errors import LlmqError, one_line
from llmq.sharing.parcel import Parcel

_LIBRARIES = {"huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


def check_repository(name: str) -> None:
    """Raise LlmqError unless a repository can have that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not is_repository(name):
        raise LlmqError(f"{name} names no repository; write org/name, or your own name before the slash")
    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise LlmqError(f"the Hub has no repository of the name {name} ({one_line(e)})") from e


def upload(parcel: Parcel, repository: str, *, private: bool = False, branch: str | None = None) -> str:
    """Send a parcel; the repository and the branch are made where they are not there. Returns the commit's address.

    private: make a repository that only its owners see; one that all see already is refused.
    Raises LlmqError where there is no token, the Hub refuses it, or the connection breaks.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise LlmqError(f"there is no token of the Hub; {_LOGIN}")
    api: Any = HfApi()
    with _Hub(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and api.model_info(repository).private is False:
            raise LlmqError(f"{repository} is there already and public; leave --private out, or name another")
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in parcel.files.items()]
        message = f"Upload {parcel.name}, made with llmq {__version__}"
        done = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return str(done.commit_url)


class _Hub:
    """Turn what huggingface_hub raises in the body into one line; as it says most by a status."""

    def __init__(self, repository: str) -> None:
        self._repository = repository

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        """Raise LlmqError for what the Hub or the way to it is at fault for."""
        if e is None or kind is None or isinstance(e, LlmqError):
            return
        known = isinstance(e, OSError | RuntimeError | ValueError) or kind.__module__.partition(".")[0] in _LIBRARIES
        if known:
            raise LlmqError(f"{self._said(e)}; nothing was committed, and OUT is as it was") from e

    def _said(self, e: BaseException) -> str:
        status = _status(e)
        if status == 401:
            return f"the Hub does not accept the token (401); {_LOGIN}"
        if status == 403:
            return f"the token may not write to {self._repository} (403); take one with write access to it"
        if status == 404:
            return f"there is no {self._repository} that this token may see (404); check the name, and the token"
        why = re.sub(r"\?\S+", "?...", one_line(e, 2000))[:300]  # an address may be signed
        if status is not None:
            return f"the Hub refuses it ({status}: {why})"
        if isinstance(e, ValueError):
            return f"huggingface_hub does not send it ({why})"
        return f"the connection to the Hub broke off ({why}); the same command sends what is missing"


def _status(e: BaseException | None) -> int | None:
    """Return the status of HTTP that an exception, or what it came from, tells."""
    while e is not None:
        found = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(found, int):
            return found
        e = e.__cause__ or e.__context__
    return None
