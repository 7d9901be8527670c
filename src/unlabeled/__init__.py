"""Self-supervised visual representation learning: methods, data and evaluations in one place."""

__version__ = "0.1.0"
