"""Text that came from files, as it may be printed."""


def escaped(text: str) -> str:
    """Without line ends, control characters and halves of characters, which a terminal would act on or not print."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
