"""Attention: positions and ropes, softmax over blocks, grouped, latent and linear forms.

Imports only the ground of `moe_jax`: config, module, norm, linear, quant.
"""
