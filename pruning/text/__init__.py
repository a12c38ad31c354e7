"""Files become documents, and these token windows: calibration, tokenizer, what is held out.

Imports `kit`.
"""
