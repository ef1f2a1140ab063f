"""Text as a user typed it, be it in an encoding that Python could not read."""


def readable(text: str) -> str:
    """The text with what Python could not decode read as UTF-8, and what is none replaced by U+FFFD.

    Where the locale is "C" or bytes are not of its encoding, Python keeps them as lone surrogates, which neither
    tokenizers nor files take.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
