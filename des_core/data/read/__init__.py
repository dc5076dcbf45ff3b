"""Raw logs -> checked records, and the keys of their values."""
