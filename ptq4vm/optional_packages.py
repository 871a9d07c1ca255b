"""Optional packages, and the extra of this package that installs each."""

from importlib.util import find_spec
from typing import Any


def require(purpose: str, extra: str, *packages: str) -> None:
    """Raises ImportError that names the extra, where a package is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{purpose} needs {' and '.join(missing)}: pip install 'ptq4vm[{extra}]'")


def pyplot() -> Any:
    """matplotlib's pyplot, which opens no window."""
    require("drawing", "plot", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
