"""The error for problems that a user can fix: in settings, data or folders."""


class ConfigError(ValueError):
    """A setting or an input that can't work. The message names the field, its value and the remedy."""
