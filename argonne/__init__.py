"""argonne: from raw text to a published chat model."""

__version__ = "0.1.0"
