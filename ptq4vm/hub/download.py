"""Downloads files of a repository into the cache of huggingface_hub, which serves them again without a network."""

from pathlib import Path

from ptq4vm import __version__
from ptq4vm.hub.failures import explained
from ptq4vm.hub.names import HubName
from ptq4vm.optional_packages import require


def download(name: HubName, *files: str) -> Path:
    """Returns the cached folder with those of the files that the repository has; no other file is fetched.

    The folder is named by the commit. Raises HubError where the repository cannot be read.
    """
    require(f"loading {name}", "hub", "huggingface_hub")
    with explained(name, f"loading {name}"):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=list(files),
                library_name="ptq4vm",
                library_version=__version__,
            )
        )
