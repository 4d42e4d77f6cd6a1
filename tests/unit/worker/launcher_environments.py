"""The variables of one worker as each launcher sets them: rank 2 of 3, alone on the second of two hosts, unless told.

Those of torchrun, DeepSpeed, OpenMPI, MPICH and Slurm are what the workers of the real programs print, without paths.
"""

TORCHRUN = {
    "LOCAL_RANK": "0",
    "RANK": "2",
    "GROUP_RANK": "1",
    "ROLE_RANK": "2",
    "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "1",
    "WORLD_SIZE": "3",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_WORLD_SIZE": "3",
    "MASTER_ADDR": "na",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "dist-moe",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}
TORCHRUN_ONE_HOST = TORCHRUN | {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "MASTER_ADDR": "na",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "3",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "LOCAL_SIZE": "1",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "CUDA_VISIBLE_DEVICES": "0",
}
# mpirun of OpenMPI 4.1; 5.0 sets PRTE_LAUNCHED in addition.
OPENMPI = {
    "OMPI_APP_CTX_NUM_PROCS": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "PMIX_ID": "2047213569.2",
    "PMIX_NAMESPACE": "2047213569",
    "PMIX_RANK": "2",
}
MPICH = {
    "HYDI_CONTROL_FD": "7",
    "MPIR_CVAR_CH3_INTERFACE_HOSTNAME": "nb",
    "MPI_LOCALNRANKS": "1",
    "MPI_LOCALRANKID": "0",
    "PMI_FD": "8",
    "PMI_RANK": "2",
    "PMI_SIZE": "3",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "2",
    "MV2_COMM_WORLD_SIZE": "3",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
    "MV2_COMM_WORLD_LOCAL_SIZE": "1",
    "PMI_RANK": "2",
    "PMI_SIZE": "3",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "2",
    "JSM_NAMESPACE_SIZE": "3",
    "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "1",
    "PMIX_RANK": "2",
}
PALS = {
    "PALS_RANKID": "2",
    "PALS_NODEID": "1",
    "PALS_LOCAL_RANKID": "0",
    "PALS_LOCAL_SIZE": "1",
    "PALS_DEPTH": "1",
    "PMI_RANK": "2",
    "PMI_SIZE": "3",
    "PMI_LOCAL_RANK": "0",
    "PMI_LOCAL_SIZE": "1",
}
# Rank 3 of 4 on two hosts: Flux tells the number of hosts, and not the tasks of each.
FLUX = {
    "FLUX_TASK_RANK": "3",
    "FLUX_JOB_SIZE": "4",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f23",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
}
ALLOCATION = {
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "na,nb",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NPROCS": "3",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SRUN = ALLOCATION | {
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "2",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_LAUNCHER_PORT": "44943",
    "SLURM_STEP_NODELIST": "na,nb",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
SRUN_PMI2 = SRUN | {
    "PMI_FD": "11",
    "PMI_JOBID": "2.0",
    "PMI_RANK": "2",
    "PMI_SIZE": "3",
    "SLURM_MPI_TYPE": "pmi2",
}
SRUN_PMIX = SRUN | {
    "PMIX_NAMESPACE": "slurm.pmix.3.0",
    "PMIX_RANK": "2",
    "PMIX_MCA_psec": "none",
    "SLURM_PMIXP_ABORT_AGENT_PORT": "40001",
}
# mpiexec.hydra in a batch script: its proxies, one for each node, are the tasks of an srun.
MPICH_IN_SLURM = (
    SRUN
    | MPICH
    | {
        "SLURM_NPROCS": "2",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }
)
# So are the daemons of OpenMPI on other nodes than that of the script.
OPENMPI_IN_SLURM = (
    SRUN
    | OPENMPI
    | {
        "SLURM_NPROCS": "1",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_STEP_NODELIST": "nb",
    }
)
# The first process of a batch script, which srun has not started; of `sbatch -N2 -n3`, `sbatch -N2`, and `sbatch`.
BATCH = ALLOCATION | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
BATCH_NODES = {key: value for key, value in BATCH.items() if key not in ("SLURM_NTASKS", "SLURM_NPROCS")} | {
    "SLURM_TASKS_PER_NODE": "1(x2)"
}
BATCH_ONE = BATCH_NODES | {"SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1"}
# The shell of salloc, and that with LaunchParameters=use_interactive_step, which is a step of one task.
SALLOC = ALLOCATION
SALLOC_STEP = BATCH | {
    "SLURM_MPI_TYPE": "none",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
# One GPU in each of three pods. Later versions of the operator set PET_* too.
PYTORCHJOB = {
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
    "RANK": "2",
    "WORLD_SIZE": "3",
    "PYTHONUNBUFFERED": "1",
}
PYTORCHJOB_PET = PYTORCHJOB | {
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "1",
}
TRAINJOB = {
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "1",
    "JOB_COMPLETION_INDEX": "2",
}
JOBSET = {"JOB_COMPLETION_INDEX": "2"}
