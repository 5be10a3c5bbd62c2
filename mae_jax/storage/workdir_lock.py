"""Exclusive lock of a workdir: a second run is refused, and a new run takes over the lock of a dead one.

On a disk, the lock is a file lock on <workdir>/lock, which the operating system releases when the process ends. In a
bucket, <workdir>/lock is an object that the run rewrites every 20 s. A new run that finds such an object watches its
generation. If the generation changes, another run is alive, and the new run is refused. If it does not change for 90 s
by the new run's own clock (clocks of different hosts are never compared), the other run is dead. The object is then
replaced on condition that it still has this generation, so that at most one run holds the lock.

A run that was frozen for longer may find that another run has its workdir. It must then write nothing, neither a
checkpoint nor metrics: the thread of the lease ends the process immediately, and `wait_until_verified`, which the
training loop calls at each step, blocks until the thread has checked the lease. While the bucket cannot be written,
training continues without checkpoints, metrics and figures (`why_unwritable`).

A process that mae_jax does not own, such as a notebook's, is not ended. Nothing more is written, and
`wait_until_verified` raises GuardError.
"""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath

from mae_jax.errors import GuardError, UserError
from mae_jax.runtime import peers
from mae_jax.runtime.exit import on_forced_exit
from mae_jax.storage.leases import BucketLease, FileLock, Lease

_held: Lease | None = None  # lease of this process's run; a process has at most one run
_lost = ""  # how the run's lease was lost, if the process continues


@contextlib.contextmanager
def hold(workdir: epath.Path, ends_process: bool = True) -> Iterator[None]:
    """Context that holds the lock of a workdir for this process's run; with several processes, process 0 holds it.

    The workdir is created if need be.

    Args:
      workdir: local or gs://.
      ends_process: whether the loss of the lock ends the process; see the module's docstring.

    Raises:
      UserError: another run holds the lock, the workdir cannot be written, or this process has a run already.
    """
    global _held, _lost
    if _held:
        raise UserError(f"this process trains already, to {_held.folder}; a second run needs a process of its own")
    lease = lease_of(workdir, ends_process)
    _lost = ""
    try:
        with taken(lease):
            _held = lease if jax.process_index() == 0 else None
            yield
    finally:
        _held, _lost = None, lease.lost


@contextlib.contextmanager
def taken(lease: Lease) -> Iterator[None]:
    """Context that holds a lease, independently of this process's run; with several processes, process 0 holds it.

    Raises:
      UserError: another run holds the lease, or the folder cannot be written.
    """
    try:
        with on_forced_exit(lease.give_back):  # also during `take`
            why = ""
            if jax.process_index() == 0:
                try:
                    lease.take()
                except UserError as error:
                    why = str(error)
            if why := peers.broadcast(why):
                raise UserError(why)
            yield
    finally:
        lease.give_back()


def lease_of(folder: epath.Path, ends_process: bool, what: str = "--workdir") -> Lease:
    """Returns the lease of a folder, local or gs://; `what` is the flag that names the folder, for messages."""
    kind = BucketLease if str(folder).startswith("gs://") else FileLock
    return kind(folder / "lock", ends_process, what)


def holds() -> bool:
    """Returns whether this process holds the lock of a workdir."""
    return _held is not None


def wait_until_verified() -> None:
    """Waits until the lock was verified recently; raises GuardError if it was lost and the process continues."""
    if _held:
        _held.wait_until_verified()
    elif _lost:
        raise GuardError(_lost)


def why_unwritable() -> str:
    """Returns why nothing may be written to the workdir at present; '' if this run certainly has it.

    Another run may take the workdir if this run cannot renew its lease in a bucket, or if the lock file was removed.
    """
    return (_held.lost or _held.why_unwritable()) if _held else _lost
