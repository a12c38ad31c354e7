"""What can go wrong beside bad input of other kinds; apart, so that catching it costs no import."""

from moe_jax.errors import InputError


class BudgetError(InputError):
    """A rule cannot keep this budget, whatever else is right; others may."""


class VerificationError(RuntimeError):
    """An exported folder does not hold what was meant; the folder is kept for inspection."""
