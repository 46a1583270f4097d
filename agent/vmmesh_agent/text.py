"""A stranger's text made fit for people: what is shown cannot move a cursor, fill a screen or fake a line."""

_MAX_SHOWN = 80  # characters


def shown(value: object) -> str:
    """Return a value for a message: quoted, escaped, short."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def printable(text: str, limit: int = 300) -> str:
    """Return a text on one line, without escape sequences, short."""
    line = "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"
