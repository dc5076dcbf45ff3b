"""What a worker does: data, engine, release."""

__version__ = "0.1.0"
