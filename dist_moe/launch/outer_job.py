"""The variables of an outer job, which would change what a launcher does that a launch starts."""

import logging
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

OUTER_JOB_PREFIXES = (
    # torchrun and its workers; it reads each of its options from PET_*, which Kubeflow sets in its pods.
    *("TORCHELASTIC_", "GROUP_", "ROLE_", "CROSS_", "PET_"),
    # The workers of an outer mpirun, but not the settings of OpenMPI (OMPI_MCA_*, PMIX_MCA_*).
    *("OMPI_COMM_WORLD_", "OMPI_APP_CTX_", "OMPI_WORLD_", "OMPI_FILE_LOCATION", "OMPI_UNIVERSE_SIZE", "OMPI_COMMAND"),
    *("OMPI_ARGV", "OMPI_NUM_APP_CTX", "OMPI_FIRST_RANKS", "OMPI_MCA_ess", "OMPI_MCA_orte_ess_", "PRTE_LAUNCHED"),
    *("OMPI_MCA_orte_hnp_uri", "OMPI_MCA_orte_local_daemon_uri", "OMPI_MCA_orte_app_num", "OMPI_MCA_orte_launch"),
    *("OMPI_MCA_orte_jobfam_session_dir", "OMPI_MCA_orte_top_session_dir", "OMPI_MCA_orte_num_nodes"),
    *("OMPI_MCA_orte_bound_at_launch", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs"),
    *("PMIX_RANK", "PMIX_ID", "PMIX_NAMESPACE", "PMIX_SERVER_", "PMIX_SECURITY_MODE", "PMIX_BFROP_", "PMIX_GDS_MODULE"),
    *("PMIX_DSTORE_", "PMIX_HOSTNAME", "PMIX_VERSION", "PMIX_SYSTEM_TMPDIR"),
    *("PMI_", "HYDI_", "MPI_LOCAL", "MV2_COMM_WORLD_", "JSM_NAMESPACE_", "PALS_", "FLUX_TASK_"),
)
# Of the task of an srun in which the launch runs. What describes the job stays: srun needs it, and so does a resume.
TASK_PREFIXES = ("SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID")
# mpirun reads hosts, numbers of workers and the way to reach the hosts from these, and ignores its own arguments.
ALLOCATION_PREFIXES = ("SLURM_", "PBS_", "LSB_", "LSF_", "COBALT_", "FLUX_", "PE_HOSTFILE")
KEPT_OF_ALLOCATION = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
"""By these a worker knows that its job was requeued; no mpirun reads them (it reads SLURM_JOBID)."""


def without_outer_job(base: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return `base` without the variables of an outer job, and log which were there.

    Args:
        base: The environment to start from.
        names: Variables to remove besides those of OUTER_JOB_PREFIXES and TASK_PREFIXES.
    """
    exact = set(names)
    of_task = {name for name in base if name.startswith(TASK_PREFIXES)}
    of_job = {name for name in base if name in exact or name.startswith(OUTER_JOB_PREFIXES)}
    for level, removed in ((logging.WARNING, of_job), (logging.INFO, of_task)):
        if removed:
            shown = ", ".join(sorted(removed))
            logger.log(level, "not passed to the launcher and its workers, since they are of another job: %s", shown)
    return {name: value for name, value in base.items() if name not in of_job | of_task}


def without_allocation(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables by which mpirun finds the nodes of a batch system's job.

    A launch passes the hosts, and how to reach them, to mpirun as arguments. With these variables mpirun would start
    the workers on the nodes of the batch job instead, or refuse to start more than the job has slots for.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT_OF_ALLOCATION or not name.startswith(ALLOCATION_PREFIXES)
    }
