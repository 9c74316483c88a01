"""A host's process for tests: answers what it is asked over a socket, each request in a thread of its own.

The environment that jax needs is set by whoever starts it (`host_run`).
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Client, Connection


def main(address: str) -> None:
    """Serve until the other side hangs up."""
    from launcher.host_process import HostProcess

    faulthandler.register(signal.SIGUSR1, all_threads=True)  # to see where one hangs
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    connection, lock = Client(address, "AF_UNIX"), threading.Lock()
    host = HostProcess(connection.recv())

    def answer(number: int, method: str, arguments: tuple) -> None:
        try:
            reply = number, True, getattr(host, method)(*arguments)
        except BaseException as error:
            logging.exception("%s failed", method)
            reply = number, False, _portable(error)
        with lock:
            connection.send(reply)

    while (request := _next(connection)) is not None:
        threading.Thread(target=answer, args=request, daemon=True).start()
    os._exit(0)


def _next(connection: Connection):
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _portable(error: BaseException) -> BaseException:
    """The error without what does not pickle."""
    known = type(error).__module__.startswith("launcher.")
    return type(error)(*error.args) if known else RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
