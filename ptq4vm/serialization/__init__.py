"""Saved models: graphs as JSON beside their tensors, verified when read."""
