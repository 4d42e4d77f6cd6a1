"""Keeps pandas out of the process that workers are forked from: it starts a thread, and packages import it if they can.

pandas is installed for the examples alone.
"""

import sys
from typing import Any

modules: dict[str, Any] = sys.modules
modules.setdefault("pandas", None)
