"""The console script: makes sure that `dist_moe` is this project's package, then runs its command line."""

import importlib
import importlib.util
import sys

DISTRIBUTION = "dist-moe-train"


def main() -> None:
    """Run the command line, or exit with code 2 and a remedy if `dist_moe` is missing or not ours."""
    fault = find_fault()
    if fault:
        print(fault, file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module("dist_moe.cli").main()


def find_fault() -> str | None:
    """Say what is wrong with the `dist_moe` that Python imports: value, rule and remedy; None if it is ours.

    The distribution `dist-moe` imports under the same name; installed beside ours it overwrites our files,
    and uninstalled again it takes them with it.
    """
    spec = importlib.util.find_spec("dist_moe")
    if spec is None:
        return _fault("no package dist_moe is installed")
    place = spec.origin or ", ".join(spec.submodule_search_locations or [])
    try:
        found = getattr(importlib.import_module("dist_moe"), "DISTRIBUTION", None)
    except Exception as error:  # Somebody else's package may fail in any way.
        return _fault(f"dist_moe at {place} does not import ({type(error).__name__}: {error})")
    if found != DISTRIBUTION:
        return _fault(f"dist_moe at {place} belongs to another distribution")
    return None


def _fault(value: str) -> str:
    return (
        f"{value}; the command dist-moe needs the dist_moe of {DISTRIBUTION}. Run `pip uninstall dist-moe`, "
        f"then in the checkout of {DISTRIBUTION} `pip install --force-reinstall --no-deps -e .`; if a folder "
        "on PYTHONPATH holds another dist_moe, take it off"
    )
