"""The folder of ready scripts that `dist-moe launch --write` makes: what its files share, and how it is written."""

import re
from collections.abc import Mapping
from pathlib import Path

from dist_moe.errors import needs_folder
from dist_moe.files import write_atomically
from dist_moe.launch.cluster import require_shell_safe
from dist_moe.launch.command import DEFAULT_PORT, OUTER_JOB_VARIABLES, LaunchError
from dist_moe.launch.launcher import LaunchRequest, load_launchers
from dist_moe.launch.template import fill_template
from dist_moe.worker.network import INTERFACE_VARIABLES

# The words of `template.shell_variable`.
RESERVED = re.compile(r"__[A-Z]+(_[A-Z]+)*__")
HOSTS = {"node0": 2, "node1": 2}
"""The example hosts of a hostfile -> slots, where the configuration has no cluster."""


def one_machine_script(
    request: LaunchRequest, launcher: str, exports: str, command: str, prepare: str | None = None
) -> str:
    """Return the script that starts all workers on the machine where it runs.

    Args:
        request: The job.
        launcher: The name of the launcher.
        exports: Lines that set the environment of the workers.
        command: The command that starts the workers.
        prepare: Lines to run before `exports`, or None.
    """
    return fill_template(
        "one_machine.sh",
        launcher=launcher,
        config=request.config_path,
        port=DEFAULT_PORT,
        workers=request.workers if request.cluster is None else len(request.cluster.hosts[0].devices),
        threads=_threads(request),
        outer_job=" ".join(OUTER_JOB_VARIABLES),
        prepare=prepare,
        exports=exports,
        command=command,
    )


def several_hosts_script(
    request: LaunchRequest,
    launcher: str,
    *,
    where: str,
    exports: str,
    command: str,
    prepare: str | None = None,
    directive: str | None = None,
) -> str:
    """Return the script that starts the workers of the hosts in the hostfile.

    Args:
        request: The job.
        launcher: The name of the launcher.
        where: Where to run the script: "on each host" or "on the first host".
        exports: Lines that set the environment of the launcher.
        command: The command that starts the workers.
        prepare: Lines to run before `exports`, or None.
        directive: A comment for shellcheck on the line above the command, or None.
    """
    return fill_template(
        "several_hosts.sh",
        launcher=launcher,
        where=where,
        config=request.config_path,
        port=request.config.cluster.port,
        outer_job=" ".join(OUTER_JOB_VARIABLES),
        prepare=prepare,
        exports=exports,
        directive=directive,
        command=command,
    )


def _threads(request: LaunchRequest) -> str:
    """The threads of each worker, as shell: a number, or this machine's cores divided among the workers, at least 1."""
    threads = request.config.run.threads
    return str(threads) if isinstance(threads, int) else "$(($(nproc) > WORKERS ? $(nproc) / WORKERS : 1))"


def all_files(request: LaunchRequest) -> dict[str, str]:
    """Return every file of the folder: relative path -> text.

    Raises:
        LaunchError: The path of the configuration needs quoting, or a text contains the name of a script's variable.
    """
    require_shell_safe("a script", [str(request.config_path)])
    reserved = [text for text in (str(request.config_path), *request.overrides) if RESERVED.search(text)]
    if reserved:
        raise LaunchError(f"{reserved[0]!r} contains a name that scripts use for a variable; rename it")
    launchers = load_launchers()
    hosts = HOSTS if request.cluster is None else {host.name: len(host.devices) for host in request.cluster.hosts}
    texts: dict[str, str] = {
        "several_hosts/hostfile": fill_template(
            "hostfile", hosts="\n".join(f"{name} slots={slots}" for name, slots in hosts.items())
        ),
        "several_hosts/environment": "".join(f"{name}={value}\n" for name, value in host_variables(request).items()),
    }
    rows = []
    for name, launcher in launchers.items():
        written = launcher.files(request)
        texts |= written
        links = ", ".join(f"[{path}]({path})" for path in written)
        rows.append(f"| `{name}` | {links or f'`dist-moe launch CONFIG --launcher {name}`'} | {launcher.summary} |")
    return {"README.md": fill_template("README.md", config=request.config_path, rows="\n".join(rows)), **texts}


def host_variables(request: LaunchRequest) -> dict[str, str]:
    """Return the variables of workers on several hosts, of which this machine is not one."""
    threads, interface = request.config.run.threads, request.config.cluster.interface
    return {
        "OMP_NUM_THREADS": str(threads) if isinstance(threads, int) else "1",
        "PYTHONSAFEPATH": "1",
        **({} if interface is None else dict.fromkeys(INTERFACE_VARIABLES, interface)),
    }


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files below a folder; scripts can be executed.

    Raises:
        UserError: The folder cannot be written.
    """
    with needs_folder(folder, "--write"):
        for name, text in texts.items():
            path = folder / name
            write_atomically(path, text)
            if path.suffix in (".sh", ".sbatch"):
                path.chmod(0o755)
