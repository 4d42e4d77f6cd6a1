"""Keeps pandas out of the process that workers are forked from: it imports pyarrow, which starts a thread.

transformers imports scikit-learn, and that pandas, if they are installed, as they are for the examples.
"""

import sys
from typing import Any

modules: dict[str, Any] = sys.modules
modules.setdefault("pandas", None)
