"""Replacement of routers and experts of a Hugging Face model in a script of any framework."""
