"""One living run per workdir: a second one is refused, and what a dead one left does not stop the next.

On a disk it is a lock on <workdir>/lock, which the system takes away with the process. In a bucket <workdir>/lock is an
object that its run writes anew every 20 s. Who finds one watches it: when its generation changes, a run lives there;
when it stays for 90 s of the watcher's own clock (clocks of hosts are never compared), the run is dead, and the object
is replaced on condition that it still has that generation. So of several runs one at most believes that it holds it.

A run that was frozen for so long may wake to find its workdir taken. Nothing it could still do in order, as to save or
to write its metrics, is right then: its thread ends the process at once, and `wait_until_verified`, which the loop
passes at each step, lets nothing be written before the thread has looked. While the bucket takes no sign of life,
training goes on without checkpoints, metrics and pictures (`why_unwritable`).

Where the process is somebody else's, as a notebook's, it is not ended: nothing more is written, and
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

_held: Lease | None = None  # of the run of this process, which has one at most
_lost = ""  # how the run's workdir was, where the process goes on


@contextlib.contextmanager
def hold(workdir: epath.Path, ends_process: bool = True) -> Iterator[None]:
    """Holds a workdir for one run; of several processes the first one does. Makes the folder.

    Args:
      workdir: local or gs://.
      ends_process: whether the process ends where the workdir is lost; else see above.

    Raises:
      UserError: a living run holds it, it cannot be written, or this process trains already.
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
    """Holds a folder beside the run that this process may have; of several processes the first one does.

    Raises:
      UserError: as of `hold`.
    """
    try:
        with on_forced_exit(lease.give_back):  # also of one that is just being taken
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
    """Returns what a folder, local or gs://, is held by; `what` names it for who finds it taken."""
    kind = BucketLease if str(folder).startswith("gs://") else FileLock
    return kind(folder / "lock", ends_process, what)


def holds() -> bool:
    """Says whether this process holds a workdir."""
    return _held is not None


def wait_until_verified() -> None:
    """Returns when it is sure that the workdir was this run's a moment ago.

    Where it was taken, ends the process, or raises GuardError, as `hold` was told.
    """
    if _held:
        _held.wait_until_verified()
    elif _lost:
        raise GuardError(_lost)


def why_unwritable() -> str:
    """Returns why nothing may be written to the workdir just now, '' where it is this run's for a while yet.

    A bucket that takes no sign of life from this run may take one from another run, which then has the workdir; so may
    another run take a lock on a disk whose file was removed.
    """
    return (_held.lost or _held.why_unwritable()) if _held else _lost
