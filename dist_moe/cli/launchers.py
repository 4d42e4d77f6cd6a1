"""The programs that start workers, as words of the command line."""

from enum import StrEnum


class Launcher(StrEnum):
    """The programs that can start the workers on this host."""

    deepspeed = "deepspeed"
    torchrun = "torchrun"
    mpirun = "mpirun"
    slurm = "slurm"
    kubernetes = "kubernetes"


class Runner(StrEnum):
    """What the deepspeed launcher starts the workers of several hosts by."""

    pdsh = "pdsh"
    openmpi = "openmpi"
    mpich = "mpich"
    slurm = "slurm"
