"""Values become tables, figures, pages and model cards; nothing is measured here.

Imports `kit`, `recipe`, `scores`, `budget`, `measure`.
"""
