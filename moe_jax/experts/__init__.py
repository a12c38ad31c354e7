"""Routed experts: router, row layout, pools of channels, grouped products and the layer.

Imports only the ground of `moe_jax`: config, module, norm, linear, quant. `moe` tells the story.
"""
