"""Lines for the user on stderr, beside the progress bar."""

import sys

from tqdm import tqdm


def notice(text: str) -> None:
    """One line on stderr that leaves the progress bar in order."""
    tqdm.write(text, file=sys.stderr)
