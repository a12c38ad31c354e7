"""Sizes, shares and times in words, the same in tables, pages and messages."""


def megabytes(size: float) -> str:
    """Bytes as megabytes (10^6) without the unit, for a column: 16317800 -> "16.3"."""
    return f"{size / 1e6:,.1f}"


def amount(size: float) -> str:
    """Bytes with their unit, for a sentence: kilobytes below ten megabytes, which these are."""
    return f"{size / 1e6:.1f} MB" if size >= 1e7 else f"{size / 1e3:.1f} kB"


def millions(count: float) -> str:
    """A count such as that of parameters: 8145664 -> "8.15 M"."""
    return f"{count / 1e6:,.2f} M"


def percent(share: float | None, places: int = 1) -> str:
    """A share in [0, 1] in percent: 0.835 -> "83.5%"; "" for None."""
    return "" if share is None else f"{share:.{places}%}"


def duration(seconds: float) -> str:
    """A time in the largest unit of which there are two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"
