"""torchrun for several hosts, with a rendezvous of ours: on one address, and without pickles of strangers.

torchrun's own rendezvous listens on every interface of the first host, and each host unpickles the state that it finds
there. Here each state carries a code (HMAC-SHA256) that only a host with the launch's secret can compute; what does not
have it is never unpickled. Call it with the arguments of torchrun.
"""

import hashlib
import hmac
import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token, create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main

from dist_moe.worker.contract import BACKEND, SECRET_VARIABLE

TIMEOUT_S = 60
CODE_BYTES = hashlib.sha256().digest_size
BACKLOG = 1024


class AuthenticatedBackend(RendezvousBackend):
    """A rendezvous whose states have a code in front, without which they are refused.

    Args:
        store: The store of the rendezvous.
        run_id: The name of the job.
        secret: What only the hosts of the job have.
    """

    def __init__(self, store: TCPStore, run_id: str, secret: bytes) -> None:
        self._backend = C10dRendezvousBackend(store, run_id)
        self._secret = secret

    @property
    def name(self) -> str:
        """The name of the backend."""
        return BACKEND

    def get_state(self) -> tuple[bytes, Token] | None:
        """Return the state and its token, or None where there is none.

        Raises:
            RendezvousStateError: The state is not of a host of this job.
        """
        found = self._backend.get_state()
        return None if found is None else (self._checked(found[0]), found[1])

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Replace the state that belongs to a token, and return the state that is there now."""
        found = self._backend.set_state(self._code(state) + state, token)
        return None if found is None else (self._checked(found[0]), found[1], found[2])

    def _checked(self, content: bytes) -> bytes:
        code, state = content[:CODE_BYTES], content[CODE_BYTES:]
        if not hmac.compare_digest(code, self._code(state)):
            raise RendezvousStateError(
                "a state of the rendezvous is not of a host of this job; close its port to others"
            )
        return state

    def _code(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, state, "sha256")


def create_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous of a job, whose store the first host (`is_host=1`) holds on the address of the endpoint.

    Raises:
        RendezvousConnectionError: The store cannot be opened or reached.
    """
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    is_host = bool(parameters.get_as_bool("is_host"))
    descriptor: int | None = None
    try:
        if is_host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            server = socket.create_server((host, port), family=family, backlog=BACKLOG)
            descriptor = server.detach()
        timeout = timedelta(seconds=TIMEOUT_S)
        store = TCPStore(host, port, None, is_host, timeout, wait_for_workers=False, master_listen_fd=descriptor)
    except (OSError, RuntimeError, ValueError) as error:
        raise RendezvousConnectionError(f"the rendezvous at {host}, port {port} cannot be used: {error}") from error
    backend = AuthenticatedBackend(store, parameters.run_id, bytes.fromhex(os.environ[SECRET_VARIABLE]))
    return create_handler(store, backend, parameters)


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, create_rendezvous)
    main()
