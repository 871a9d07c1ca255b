"""Escapes text from files for printing."""

from collections.abc import Iterable


def escaped(text: str) -> str:
    """Escapes line ends, control characters and lone surrogates, which a terminal would act on or not print."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def listing(names: Iterable[object]) -> str:
    """Returns the first eight names, escaped, and how many there are if there are more."""
    shown = [escaped(str(name)) for name in names]
    more = f", … ({len(shown)} in all)" if len(shown) > 8 else ""
    return ", ".join(shown[:8]) + more
