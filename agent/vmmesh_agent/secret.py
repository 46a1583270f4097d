"""A secret as a type: what is masked cannot be logged by accident."""

import hmac


class Secret:
    """Text that must not be printed. `str()` and `repr()` are masked; `reveal()` is the one way out."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself; call it only where it is written or sent."""
        return self._text

    def __str__(self) -> str:
        return "(secret)"

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._text))
