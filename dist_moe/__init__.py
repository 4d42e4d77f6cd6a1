"""Distributed expert-parallel training of Mixture-of-Experts models, balanced without an auxiliary loss."""

DISTRIBUTION = "dist-moe-train"
"""The installed distribution that this package belongs to; another one imports under the same name."""

__version__ = "0.1.0"
