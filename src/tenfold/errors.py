"""Mistakes that a person can mend."""

import difflib
from collections.abc import Iterable


class TenfoldError(Exception):
    """Bad input: what was wrong, in which file or field, what would be accepted.

    The command line prints the message on one line and exits with status 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest known word, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
