"""Weights without their zeros, and the kernels that run them."""
