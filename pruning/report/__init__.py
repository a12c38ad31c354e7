"""Values become tables, figures, pages and model cards; nothing is measured here.

Imports `kit`, `recipe`, `text`, `scores`, `budget`, `measure`; a page imports its value, never the
other way round.
"""
