"""The launchers, one module each, and their names."""

import pkgutil


def launcher_names() -> list[str]:
    """Return the names of all launchers: the modules of this package. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
