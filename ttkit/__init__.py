"""ttkit: where should test-time compute go? More samples, more training, or smarter selection."""

__version__ = "0.1.0"
