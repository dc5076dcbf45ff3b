"""Metrics of scores that stay on the workers that made them: exact, equal for every number of workers."""
