"""Weights and training state on storage: one form for resuming, warm starts and serving."""
