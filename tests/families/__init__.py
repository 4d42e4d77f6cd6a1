"""Every family of MoE models in the installed transformers: small models, and what the package does with them."""
