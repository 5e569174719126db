"""One check: what it is called, whether it holds, and the figure that it was judged by."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# What a check returns: whether it holds, and the figure.
Outcome = tuple[bool, str]
Check = tuple[str, Callable[[], Outcome]]


@dataclass(frozen=True)
class Finding:
    """The outcome of a check."""

    name: str
    passed: bool
    detail: str


def run_checks(checks: Iterable[Check]) -> Iterator[Finding]:
    """One finding at a time. A check that raises is a failed one."""
    for name, check in checks:
        try:
            yield Finding(name, *check())
        except Exception as error:  # whatever goes wrong in a check is its finding
            yield Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
