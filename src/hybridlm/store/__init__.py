"""`resolve`: the one way any command opens a MODEL, wherever it lives."""

from hybridlm.store.resolve import resolve

__all__ = ["resolve"]
