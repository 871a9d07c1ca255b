"""Names of repositories on the Hub, `hf-hub:org/name` or `hf-hub:org/name@revision`, as timm writes them."""

import re
from pathlib import Path
from typing import NamedTuple

PREFIX = "hf-hub:"
MAX_LENGTH = 96

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_WAY_OUT = f"write {PREFIX}org/name, or {PREFIX}org/name@revision"


class HubName(NamedTuple):
    """Repository of a model, and the branch, tag or commit in it; None for its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(name: str | Path) -> bool:
    """Whether a model's name is that of a repository; all others are folders or names of timm."""
    return str(name).startswith(PREFIX)


def parse_name(name: str) -> HubName:
    """Returns the parts of a name; raises ValueError for one that names no repository.

    Example:
        >>> parse_name("hf-hub:org/name@v1")
        HubName(repo='org/name', revision='v1')
    """
    repo, at, revision = name.removeprefix(PREFIX).partition("@")
    if not is_repo(repo):
        raise ValueError(f"{name!r:.120} names no repository of the Hub: {_WAY_OUT}")
    if at and not re.fullmatch(r"[\w./-]+", revision):
        raise ValueError(f"{name!r:.120} names no revision after the @: {_WAY_OUT}")
    return HubName(repo, revision or None)


def is_repo(text: str) -> bool:
    """Whether a text is `org/name` as the Hub allows it.

    Example:
        >>> is_repo("org/name.v1"), is_repo("name"), is_repo("../name"), is_repo("org/a--b")
        (True, False, False, False)
    """
    odd = "--" in text or ".." in text or text.endswith(".git")
    return len(text) <= MAX_LENGTH and not odd and _REPO.fullmatch(text) is not None


def hint(name: str | Path) -> str:
    """Returns the end of an error for a name that may be a repository's without its prefix; else nothing."""
    text = Path(name).as_posix()
    repo = text.partition("@")[0]
    return f"; if it is a repository of the Hub, write {PREFIX}{text}" if is_repo(repo) else ""
