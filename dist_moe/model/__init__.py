"""The model: a Hugging Face MoE model whose routers and experts are replaced from outside, and its loss."""
