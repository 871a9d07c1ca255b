"""Escapes text from files for printing."""


def escaped(text: str) -> str:
    """Escapes line ends, control characters and lone surrogates, which a terminal would act on or not print."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
