"""The configuration of a run: its fields, how they are read, and whether they fit together."""

from dist_moe.config.load import dump_config, load_config
from dist_moe.config.renamed_keys import load_stored_config
from dist_moe.config.resolve import Resolved, resolve
from dist_moe.config.schema import Config
from dist_moe.errors import ConfigError, Violation
from dist_moe.families.record import Family
from dist_moe.families.registry import family_of

__all__ = [
    "Config",
    "ConfigError",
    "Family",
    "Resolved",
    "Violation",
    "dump_config",
    "family_of",
    "load_config",
    "load_stored_config",
    "resolve",
]
