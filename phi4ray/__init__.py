"""phi4ray: run Phi-4 over huge prompt datasets, and serve it, on one fleet of GPUs."""

__version__ = "0.1.0"
