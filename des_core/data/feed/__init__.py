"""Feature store -> the batches of one worker."""
