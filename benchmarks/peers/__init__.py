"""What `python benchmarks/peers.py` is made of, one file per question; the reader begins at ``driver``."""
