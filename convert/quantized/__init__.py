"""Weights that a checkpoint stores in few bits, under their public names and dequantised.

Each published format is one file; `read` finds the file for a config.json. `config` reads what the
quantisation says of itself, `arithmetic` is what all formats share. A tensor is dequantised when it
is read, by the rule of the format's own library, and nothing else is in memory then.
"""
