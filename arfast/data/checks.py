"""Checks of arguments, with the uniform error."""

import operator

MAX_SEED = 2**64 - 1


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """The value as an int; ValueError when it is no integer in [minimum, maximum]. ``name`` reads "owner: argument"."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
        interval = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be an integer {interval}, got {value!r}")
    return number


def check_at_least(owner: str, arguments: object, **lowest: int) -> None:
    """ValueError for an attribute of ``arguments``, an int or None, that is less than its lowest value."""
    for name, low in lowest.items():
        if (value := getattr(arguments, name)) is not None and value < low:
            raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")


def one_line(error: object) -> str:
    """The text of an error that quotes a file, without its line ends and cut off: for the end of another's sentence."""
    return f"{' '.join(str(error).split()):.200}"


def check_text(name: str, text: object) -> None:
    """TypeError when ``text`` is no str, ValueError when it has no UTF-8 form. ``name`` reads "owner: argument"."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got a lone surrogate at {error.start}") from None
