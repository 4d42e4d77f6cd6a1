"""Runs DeepSpeed's launcher of one host, and imports torch for it only where it needs torch.

`python -m dist_moe.launch.deepspeed_host OPTIONS` does what `python -m deepspeed.launcher.launch OPTIONS` does: the
part of the command `deepspeed` that starts the workers of a host. Importing it takes 2.5 s before any worker starts,
because a module of a package imports the package, here all of DeepSpeed and torch. Of that, the launcher uses a logger
and two functions, and on a host without accelerators none of them needs torch.
"""

import importlib
import importlib.util
import os
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

LAUNCHER = "deepspeed.launcher.launch"
STOOD_IN_FOR = ("torch", "deepspeed")
ACCELERATOR_VARIABLE = "DS_ACCELERATOR"
"""The accelerator that DeepSpeed is to use, instead of one that it finds by torch."""


def main() -> None:
    """Run the launcher with the arguments of this process."""
    load_launcher(without_torch=os.environ.get(ACCELERATOR_VARIABLE) == "cpu").main()


def load_launcher(without_torch: bool) -> Any:
    """Import the module of DeepSpeed's launcher.

    Args:
        without_torch: Import it alone, if that is possible with the installed version of DeepSpeed.
    """
    if without_torch:
        before = set(sys.modules)
        try:
            return _load_alone()
        except Exception:  # the launcher of another version may need anything
            added = sys.modules.keys() - before
            for name in [name for name in added if name.partition(".")[0] in STOOD_IN_FOR]:
                del sys.modules[name]
    return importlib.import_module(LAUNCHER)


def _load_alone() -> ModuleType:
    """Import the launcher with stand-ins for torch and for the packages around it, which are not executed."""
    torch = ModuleType("torch")
    torch.__dict__["__version__"] = metadata.version("torch")
    sys.modules["torch"] = torch
    for name in ("deepspeed", "deepspeed.utils"):
        sys.modules[name] = _without_its_code(name)
    log, numa = (importlib.import_module(f"deepspeed.utils.{name}") for name in ("logging", "numa"))
    sys.modules["deepspeed.utils"].__dict__.update(
        logger=log.logger,
        set_log_level_from_string=log.set_log_level_from_string,
        get_numactl_cmd=numa.get_numactl_cmd,
    )
    launcher = importlib.import_module(LAUNCHER)
    launcher.get_accelerator()
    return launcher


def _without_its_code(name: str) -> ModuleType:
    """Return a package whose modules can be imported, and whose `__init__` has not run."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {name}")
    return importlib.util.module_from_spec(spec)


if __name__ == "__main__":
    main()
