"""Finds the MoE layers of a Hugging Face model, and what its routers compute."""
