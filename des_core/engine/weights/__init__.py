"""Rows in memory and at rest: index, table, update rules, checkpoints."""
