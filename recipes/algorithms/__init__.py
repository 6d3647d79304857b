"""RL algorithms as parts: small pure functions, each chosen by name in ``algorithm.<part>`` (``registry.py``)."""
