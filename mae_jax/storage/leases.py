"""Leases, by which one process at a time may write to a folder: a file lock on a disk, a renewed object in a bucket.

`workdir_lock` describes the protocol, and what a process does that has lost its lease.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from mae_jax import errors
from mae_jax.errors import GuardError, UserError
from mae_jax.runtime import bounded_json
from mae_jax.runtime import peers as runtime_peers
from mae_jax.runtime.exit import exit_now, write_stderr

RENEWED = 20.0  # seconds between renewals
DEAD = 90.0  # seconds without a renewal after which the run counts as dead
FIRST, LAST = 10.0, 3.0  # timeouts in seconds of taking and of giving back a lease
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # ESTALE: another host removed the file
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks

logger = logging.getLogger(__name__)


def _signature() -> bytes:
    """Returns a description of this run, unique among all runs, as JSON."""
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex,
                       "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}).encode()


def _who(text: bytes) -> str:
    """Returns the run that a signature describes, for messages."""
    try:
        found = bounded_json.parse(text)
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown run"


def _device(path: str) -> int:
    """Returns the device number of a path, or of its nearest existing parent; raises OSError."""
    path = os.path.abspath(path)
    while True:
        try:
            return os.stat(path).st_dev
        except OSError as error:
            if error.errno not in MISSING_ERRNOS or path == os.path.dirname(path):
                raise
        path = os.path.dirname(path)


class Lease:
    """Base of the leases of a folder.

    Attributes:
      path: of the lock, a file or an object in a bucket.
      folder: the folder that the lease protects.
      ends_process: whether the loss of the lease ends the process.
      lost: how the lease was lost, if the process continues; else ''.
    """

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        self.path, self.folder, self.ends_process, self.lost = path, path.parent, ends_process, ""
        self._what = what

    def take(self) -> None:
        """Takes the lease; raises UserError, which names the holder, if another run has it."""
        raise NotImplementedError

    def give_back(self) -> None:
        """Gives the lease back; does nothing if it was lost or never taken."""
        raise NotImplementedError

    def why_unwritable(self) -> str:
        """Returns why this process may not have the lease at present; '' if it certainly has."""
        raise NotImplementedError

    def wait_until_verified(self) -> None:
        """Waits until the lease was verified recently; raises GuardError if it is lost."""
        if self.lost:
            raise GuardError(self.lost)

    def _in_use(self, text: bytes) -> UserError:
        return UserError(f"{self.folder} is in use by another run: {_who(text)}; wait for its end or use another "
                         f"{self._what}")

    def _stop(self, line: str) -> None:
        """Ends all processes immediately, from any thread, since an orderly end would write to the folder.

        If `ends_process` is False, it only sets `lost`.
        """
        if not self.ends_process:
            self.lost = line
            return
        if peers := runtime_peers.peers():
            peers.leave(errors.GUARD, f"stopped: {line}")
        write_stderr(f"stopped: {line}")
        exit_now(errors.GUARD)


class FileLock(Lease):
    """A lock on a file. The file stays after the run, unless the run made the folder and wrote nothing else to it."""

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        super().__init__(path, ends_process, what)
        self.made = not self.folder.exists()
        self.descriptor, self.taken = -1, False
        self.devices: dict[str, int] = {}  # path → device, of the folder and of its checkpoints if these are a link

    def take(self) -> None:
        """Takes the lock; raises UserError, which names the holder, if another run has it."""
        try:
            while self.descriptor < 0 or not self._is_there():
                self._close()
                self._open()
        except BlockingIOError:
            text = os.read(self.descriptor, 1000)
            self._close()
            raise self._in_use(text) from None
        except OSError as error:
            if self.descriptor < 0 or error.errno not in NO_LOCKS:
                self._close()  # an open descriptor would count as locked
                why = "a file is in its place" if isinstance(error, FileExistsError) else error.strerror or error
                raise UserError(f"cannot write the workdir {self.folder}: {why}") from None
            logger.warning("the file system of %s has no locks: a second run is not detected", self.path)
        self.taken = True
        if not self.devices:
            checkpoints = os.path.join(self.folder, "checkpoints")
            self.devices = {path: _device(path) for path in (str(self.folder), checkpoints)
                            if path != checkpoints or os.path.islink(path)}
        with contextlib.suppress(OSError):  # the lock holds even on a full disk
            os.truncate(self.descriptor, 0)
            os.write(self.descriptor, _signature())

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _is_there(self) -> bool:
        """Returns whether the path still is the locked file, which another run or a person may have removed."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError as error:
            if error.errno not in MISSING_ERRNOS:
                raise
            return False

    def why_unwritable(self) -> str:
        """Returns why this run may not have the lock; '' if it has. Creates and locks the file again if it was removed.

        Ends the process if the folder is on another disk than at the start: its disk was unmounted, and files written
        to the mount point now would be hidden by the next mount.
        """
        try:
            for path, device in self.devices.items():
                if self.taken and _device(path) != device:
                    self._stop(f"{path} is not on the disk that it was on when the run began (unmounted?); nothing "
                               "more is written; mount it again, and the same command resumes the run")
                    return self.lost
            if self.taken and (self.descriptor < 0 or not self._is_there()):
                self.take()
                logger.warning("%s had been removed, and is there again", self.path)
        except (OSError, UserError) as error:
            return str(error)
        return ""

    def give_back(self) -> None:
        """Releases the lock."""
        if not self.taken:  # the file may be another run's
            return
        with contextlib.suppress(OSError):
            ours = self.descriptor >= 0 and self._is_there()
            if ours and self.made and os.listdir(self.folder) == [self.path.name]:
                self.path.unlink()
                self.folder.rmdir()
        self._close()
        self.taken = False


class BucketLease(Lease):
    """An object in a bucket that this run renews regularly.

    Attributes:
      looked: time (time.monotonic) at which the last attempt to renew it ended.
      renewed: time at which the last successful renewal began.
    """

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        super().__init__(path, ends_process, what)
        self.looked = self.renewed = time.monotonic()
        self._name, self._text = str(path), _signature()
        self._generation = 0
        self._over = threading.Event()
        self._writing = threading.RLock()  # reentrant: `_lost` ends the process, and gives back, while holding it
        self._failing = False

    def take(self) -> None:
        """Takes the lease, if need be after DEAD seconds without a renewal by its holder.

        Raises:
          UserError: another run renews the lease (the message names it), or the bucket cannot be written.
        """
        from mae_jax.storage import gcs

        seen, since = None, time.monotonic()
        began = since
        try:
            while not self._try(seen.generation if seen and time.monotonic() - since > DEAD else 0):
                found, began = gcs.read(self._name), time.monotonic()
                if found is None:  # the holder has ended
                    seen = None
                elif seen is None:
                    logger.warning("%s was left by %s; waiting up to %g s to see whether that run is alive",
                                   self.path, _who(found.content), DEAD)
                    seen, since = found, time.monotonic()
                elif found.generation != seen.generation:
                    raise self._in_use(found.content)
                time.sleep(min(2.0, DEAD / 10))
        except gcs.BucketError as error:
            raise UserError(f"cannot write the workdir: {error}") from None
        if seen:
            logger.warning("took over %s after %.0f s", self.path, time.monotonic() - since)
        self.looked, self.renewed = time.monotonic(), began
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def wait_until_verified(self) -> None:
        """Waits until the last attempt to renew the lease is recent; raises GuardError if it is lost."""
        while not self.lost and time.monotonic() - self.looked > DEAD / 2:
            time.sleep(0.05)
        super().wait_until_verified()

    def why_unwritable(self) -> str:
        """Returns why another run may have the lease; '' if this run has it for at least RENEWED seconds more."""
        silent = time.monotonic() - self.renewed
        return f"the lease could not be renewed for {silent:.0f} s, so another run may have the workdir" * (
            silent > DEAD - RENEWED)

    def _try(self, generation: int) -> bool:
        with self._writing:  # `give_back`, after a signal, waits for the result
            return not self._over.is_set() and self._write(generation, FIRST)

    def _write(self, generation: int, seconds: float) -> bool:
        """Writes the object if its generation is `generation`, 0 for none; returns False if it is another run's."""
        from mae_jax.storage import gcs

        try:
            self._generation = gcs.write(self._name, self._text, seconds, generation) or 0
        except gcs.GenerationMismatch:
            found = gcs.read(self._name)
            if found is None or found.content != self._text:
                return False
            self._generation = found.generation  # this run's: the response to an earlier try was lost
        return True

    def _renew(self) -> None:
        """Renews the lease, in its own thread, and ends the process if another run has taken over."""
        from mae_jax.storage import gcs

        while not self._over.wait(RENEWED / 4 if self._failing else RENEWED):
            with self._writing:
                if self._over.is_set():
                    return
                began = time.monotonic()
                try:
                    if not self._write(self._generation, RENEWED / 2):
                        self._lost(gcs.read(self._name))
                        return
                    if self._failing:
                        logger.warning("%s is renewed again", self.path)
                    self._failing, self.renewed = False, began
                except Exception as error:  # the thread must survive any error
                    if not self._failing:
                        logger.warning("cannot renew the run's lease: %s; training goes on, and it is tried again",
                                       error)
                    self._failing = True
                self.looked = time.monotonic()

    def _lost(self, found: Any) -> None:
        """Ends the process; `found` is the StoredObject of the run that took over, None if that has ended."""
        silent, self._generation = time.monotonic() - self.renewed, 0
        by = _who(found.content) if found else "a run that has ended since"
        line = (f"{self.folder} was taken over by {by}, after this run had not renewed its lease for "
                f"{silent:.0f} s; nothing more is written")
        self._stop(line)

    def give_back(self) -> None:
        """Deletes the object, if it is this run's. After a failure, the next run must wait DEAD seconds."""
        from mae_jax.storage import gcs

        self._over.set()
        if not self._writing.acquire(timeout=LAST):
            return
        try:
            if self._generation:
                gcs.delete(self._name, self._generation, LAST)
        except (gcs.BucketError, gcs.GenerationMismatch) as error:
            logger.warning("could not remove %s (%s): the next run has to wait %g s", self.path, error, DEAD)
        finally:
            self._generation = 0
            self._writing.release()
