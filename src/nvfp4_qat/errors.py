"""The errors this package raises on purpose; everything else is a bug.

`UserError` is for bad input or usage: the command line turns it into one line and exit code 2. `MismatchError` is for a
check that failed, that is, two sides hold different numbers: exit code 1. Both say how to mend the situation.
"""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input or usage; the message says what is wrong and how to mend it."""


class MismatchError(RuntimeError):
    """A check failed; the message lists every difference by name."""

    @classmethod
    def while_read(cls) -> "MismatchError":
        """The error for weights that a step wrote while they were being streamed."""
        return cls(
            "the weights changed while packed_weights was being read: go on training when the stream is exhausted, or "
            "the receiver gets a mixture of two steps"
        )


class StaleWeightsError(MismatchError):
    """Master weights changed without the packed copies that training used having been renewed."""

    @classmethod
    def of(cls, names: Sequence[str]) -> "StaleWeightsError":
        """The error for the weights of these names."""
        return cls(
            f"{len(names)} weights changed without notice, so training used old 4-bit copies of them: "
            f"{', '.join(names)}. Call nvfp4_qat.refresh(model) after every write that bypasses torch.optim and "
            "load_state_dict."
        )
