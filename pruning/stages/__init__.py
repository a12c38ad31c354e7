"""One step each, from file to file: open, score, plan, export, verify.

Imports every room above and `convert`. What is gone on with after a kill: whole runs in `folder`,
parts of scoring in `parts`, repaired weights in `repair`, 4-bit codes in `gptq`.
"""
