"""Optional packages that a configuration needs."""

import importlib.util

from dist_moe.config.schema import Config
from dist_moe.errors import Violation

ARROW_EXTRA = "pip install -c constraints.txt '.[arrow]'"


def has_pyarrow() -> bool:
    """Return whether this Python can write and read traces."""
    return importlib.util.find_spec("pyarrow") is not None


def package_violations(config: Config) -> list[Violation]:
    """What needs a package that is not installed."""
    if not config.observe.trace_interval or has_pyarrow():
        return []
    rule = "writes Parquet files, for which pyarrow is not installed"
    remedy = f"install the extra `arrow` ({ARROW_EXTRA}) on every host, or set it to 0"
    return [Violation("observe.trace_interval", config.observe.trace_interval, rule, remedy)]
