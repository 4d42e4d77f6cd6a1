"""Families of Hugging Face MoE models, one file each; every file is imported without torch and transformers."""
