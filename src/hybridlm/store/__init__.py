"""`resolve`: the one way any command opens a MODEL, wherever it lives."""

from hybridlm.store.cache import Report, home
from hybridlm.store.resolve import resolve, weights

__all__ = ["Report", "home", "resolve", "weights"]
