"""Quantized models on the Hugging Face Hub: names of repositories, downloads, model cards, uploads.

huggingface_hub is imported where it is used, and the network is opened for names that begin with `hf-hub:` alone.
"""
