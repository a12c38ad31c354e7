"""Files become token windows: calibration, tokenizer, what is held out.

Imports `kit`.
"""
