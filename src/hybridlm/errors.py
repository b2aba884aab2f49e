"""The errors that a user can cause, each with a message that names the cause and the way out.

The command line prints these as one line without a traceback; everything else is a bug and shows one.
"""

__all__ = ["ConfigError", "DataError", "FormatError", "HybridLMError", "ModelNotFoundError"]


class HybridLMError(Exception):
    """Base of all errors that come from input rather than from a bug."""


class ConfigError(HybridLMError):
    """An architecture or a recipe that cannot exist; the message starts with the field's name."""


class FormatError(HybridLMError):
    """A model file that is truncated, damaged, hostile or of an unknown kind."""


class DataError(HybridLMError):
    """Training or evaluation text that cannot be read."""


class ModelNotFoundError(HybridLMError):
    """A model name that resolves to nothing here or on the hub."""
