"""The fields of a job under Kubernetes."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from dist_moe.section import Section

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
# YAML reads `cpu: 2` as a number.
Cores = Annotated[
    str,
    BeforeValidator(lambda given: str(given) if type(given) in (int, float) else given),
    Field(pattern=r"^[0-9]+(\.[0-9]+|m)?$"),
]
ObjectName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$")]
OBJECT_NAME = "at most 50 of a to z, 0 to 9 and -, from a letter to a letter or digit"
ImageName = Annotated[str, Field(pattern=r"^[\w][\w./:@-]*$")]


class KubernetesConfig(Section):
    """An Indexed Job of Kubernetes with one pod per node."""

    name: ObjectName = Field(
        default="dist-moe", description=f"the name of the job, its service and its ConfigMap ({OBJECT_NAME})"
    )
    namespace: ObjectName | None = Field(
        default=None, description=f"the namespace ({OBJECT_NAME}), or null (that of kubectl)"
    )
    image: ImageName = Field(
        default="dist-moe:cpu", description="the container image, such as dist-moe:cpu, which `make docker` builds"
    )
    pods: int = Field(default=2, ge=1, description="the number of pods, one per node (1 or more)")
    workers_per_pod: int = Field(default=1, ge=1, description="the workers in each pod, one per device (1 or more)")
    cpu: Cores = Field(default="2", description="the CPU cores of each pod, such as 2 or 500m")
    memory: Quantity = Field(default="4Gi", description="the memory of each pod, such as 4Gi")
    gpus: int = Field(default=0, ge=0, description="the GPUs of each pod (0: none)")
    shared_memory: Quantity = Field(
        default="1Gi", description="the size of /dev/shm in each pod, such as 1Gi, which its workers share"
    )
    claim: ObjectName = Field(
        default="dist-moe-runs", description=f"the PersistentVolumeClaim (ReadWriteMany) for run.dir ({OBJECT_NAME})"
    )
    retries: int = Field(
        default=3, ge=0, description="the number of pods that may fail before the job fails (0 or more)"
    )
    tensorboard: bool = Field(default=True, description="whether to deploy TensorBoard with the job")
