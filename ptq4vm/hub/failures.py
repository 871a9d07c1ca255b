"""One sentence, with the way out, for each error of huggingface_hub."""

import contextlib
from collections.abc import Iterator

from ptq4vm.hub.names import HubName
from ptq4vm.serialization.model_file import CheckpointError

_LOGIN = "log in with 'hf auth login', or set HF_TOKEN"


class HubError(CheckpointError, OSError):
    """Raised where a repository of the Hub cannot be read or written."""


@contextlib.contextmanager
def explained(name: HubName, doing: str, *, writes: bool = False) -> Iterator[None]:
    """Makes a `HubError` of whatever huggingface_hub raises; `doing` begins the sentence, such as "loading x"."""
    try:
        yield
    except Exception as error:
        raise HubError(f"{doing} failed: {_reason(error, name, writes)}") from error


def _reason(error: Exception, name: HubName, writes: bool) -> str:
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    chain = list(_causes(error))
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        missing = "it is not in the cache, or not whole, and " if isinstance(error, FileNotFoundError) else ""
        return f"{missing}HF_HUB_OFFLINE is set, which keeps the network closed: unset it"
    http = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    if http is None:
        network = f"{where} cannot be reached ({_text(chain[-1])}): check the network"
        return network if _is_network(chain) else _text(error)
    status = http.response.status_code
    if isinstance(http, errors.GatedRepoError):
        return f"{name.repo} is gated: accept its terms on {where}/{name.repo}, and {_LOGIN}"
    if isinstance(http, errors.RevisionNotFoundError):
        return f"{name.repo} has no revision {name.revision or 'main'}; {where}/{name.repo}/commits/main lists them"
    if isinstance(http, errors.RepositoryNotFoundError) and not writes:
        return f"there is no repository {name.repo} on {where}, or it is private: check the name, or {_LOGIN}"
    if status in (401, 403):
        return f"{where} refuses it ({status}): {_LOGIN}, as an account with the right to {name.repo}"
    return f"{where} answered with {status} ({_text(http)}); try again later" if status >= 500 else _text(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network(chain: list[BaseException]) -> bool:
    """Whether a transport failed; libraries for HTTP differ by the version of huggingface_hub, so their names tell."""
    kinds = (base.__name__ for cause in chain for base in type(cause).__mro__)
    return not {"ConnectionError", "TransportError", "TimeoutError", "LocalEntryNotFoundError"}.isdisjoint(kinds)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
