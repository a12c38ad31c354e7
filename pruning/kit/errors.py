"""What can go wrong other than bad input; apart, so that catching it costs no import."""


class VerificationError(RuntimeError):
    """An exported folder does not hold what was meant; the folder is kept for inspection."""
