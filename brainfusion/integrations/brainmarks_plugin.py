"""Installed as `brainmarks/models/brainfusion.py`, where brainmarks looks for models of others.

brainmarks imports every module of its namespace package `brainmarks.models`; the wheel puts this
file there (pyproject.toml, force-include).
"""

import brainfusion.integrations.brainmarks  # noqa: F401  (registers on import)
