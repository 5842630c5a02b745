"""The errors this package raises on purpose; everything else is a bug.

`UserError` is for bad input or usage: the command line turns it into one line and exit code 2. `MismatchError` is for a
check that failed, that is, two sides hold different numbers: exit code 1. Both say how to mend the situation.
"""


class UserError(ValueError):
    """Bad input or usage; the message says what is wrong and how to mend it."""


class MismatchError(RuntimeError):
    """A check failed; the message lists every difference by name."""


class StaleWeightsError(MismatchError):
    """A master weight changed without the packed copy that training used having been renewed."""
