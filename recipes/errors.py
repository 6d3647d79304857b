"""The error of everything that a user can put right: settings, data, folders."""


class ConfigError(ValueError):
    """A setting or an input that can't work. The text names the field, its value and what to do."""
