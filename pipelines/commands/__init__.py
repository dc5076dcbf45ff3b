"""The commands of ``des``, one file each."""
