"""What a folder is held by, so that one process writes to it: a lock on a disk, an object that is renewed in a bucket.

`workdir_lock` says how long they last, and what a process does that finds its own taken.
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

RENEWED = 20.0  # seconds from one sign of life to the next
DEAD = 90.0  # seconds without one
FIRST, LAST = 10.0, 3.0  # seconds for what is done at the start and at the end
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # the last one where another host removed it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that know none

logger = logging.getLogger(__name__)


def _signature() -> bytes:
    """Returns who this is, unlike any other run."""
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex,
                       "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}).encode()


def _who(text: bytes) -> str:
    """Returns who signed a lease."""
    try:
        found = bounded_json.parse(text)
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "a run that did not say who it is"


def _device(path: str) -> int:
    """Returns the number of the device that a path is on, or would be once it is made; raises OSError."""
    path = os.path.abspath(path)
    while True:
        try:
            return os.stat(path).st_dev
        except OSError as error:
            if error.errno not in MISSING_ERRNOS or path == os.path.dirname(path):
                raise
        path = os.path.dirname(path)


class Lease:
    """What a folder is held by.

    Attributes:
      path: of the lock, a file or an object of a bucket.
      folder: that it holds.
      ends_process: whether the process ends where the folder is lost.
      lost: how it was, where the process goes on.
    """

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        self.path, self.folder, self.ends_process, self.lost = path, path.parent, ends_process, ""
        self._what = what

    def take(self) -> None:
        """Takes it; raises UserError, naming who has it."""
        raise NotImplementedError

    def give_back(self) -> None:
        """Gives it back; what was lost, or never taken, stays as it is."""
        raise NotImplementedError

    def why_unwritable(self) -> str:
        """Returns why it is not sure that this process has it, '' where it is."""
        raise NotImplementedError

    def wait_until_verified(self) -> None:
        """Returns when it is sure that this process had it a moment ago; raises GuardError where it is lost."""
        if self.lost:
            raise GuardError(self.lost)

    def _in_use(self, text: bytes) -> UserError:
        return UserError(f"{self.folder} is in use by a living run: {_who(text)}; wait for its end or use another "
                         f"{self._what}")

    def _stop(self, line: str) -> None:
        """Ends all processes at once, from any thread: nothing that is still to do in order may be done.

        Returns where the process is not ours to end.
        """
        if not self.ends_process:
            self.lost = line
            return
        if peers := runtime_peers.peers():
            peers.leave(errors.GUARD, f"stopped: {line}")
        write_stderr(f"stopped: {line}")
        exit_now(errors.GUARD)


class FileLock(Lease):
    """A lock on a file, which stays behind, but in a folder that was made for it and where nothing came of the run."""

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        super().__init__(path, ends_process, what)
        self.made = not self.folder.exists()
        self.descriptor, self.taken = -1, False
        self.devices: dict[str, int] = {}  # of the folder, and of its checkpoints where these are a link

    def take(self) -> None:
        """Takes the lock; raises UserError, naming who holds it."""
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
                self._close()  # open, it would count as locked
                why = "a file is in its place" if isinstance(error, FileExistsError) else error.strerror or error
                raise UserError(f"cannot write the workdir {self.folder}: {why}") from None
            logger.warning("the file system of %s has no locks: nothing keeps a second run out of it", self.path)
        self.taken = True
        if not self.devices:
            checkpoints = os.path.join(self.folder, "checkpoints")
            self.devices = {path: _device(path) for path in (str(self.folder), checkpoints)
                            if path != checkpoints or os.path.islink(path)}
        with contextlib.suppress(OSError):  # a full disk; it is held all the same
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
        """Says whether the file was not removed: by a run that held it, before it was locked here, or since."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError as error:
            if error.errno not in MISSING_ERRNOS:
                raise
            return False

    def why_unwritable(self) -> str:
        """Returns why it is not sure that this run has the lock; makes the file again where somebody removed it.

        Ends the process where the folder is on another disk than it was: what is there now is what a mount had hidden,
        and would be hidden again by the next one.
        """
        try:
            for path, device in self.devices.items():
                if self.taken and _device(path) != device:
                    self._stop(f"{path} is not on the disk that it was on when the run began (unmounted?); nothing "
                               "more is written; mount it again, and the same command goes on")
                    return self.lost
            if self.taken and (self.descriptor < 0 or not self._is_there()):
                self.take()
                logger.warning("%s had been removed, and is there again", self.path)
        except (OSError, UserError) as error:
            return str(error)
        return ""

    def give_back(self) -> None:
        """Ends the lock."""
        if not self.taken:  # what lies there may be another run's
            return
        with contextlib.suppress(OSError):
            ours = self.descriptor >= 0 and self._is_there()
            if ours and self.made and os.listdir(self.folder) == [self.path.name]:
                self.path.unlink()
                self.folder.rmdir()
        self._close()
        self.taken = False


class BucketLease(Lease):
    """An object that is renewed as long as this run lives.

    Attributes:
      looked: when, by the monotonic clock, the last attempt to renew it ended.
      renewed: when the last one that succeeded began.
    """

    def __init__(self, path: epath.Path, ends_process: bool = True, what: str = "--workdir"):
        super().__init__(path, ends_process, what)
        self.looked = self.renewed = time.monotonic()
        self._name, self._text = str(path), _signature()
        self._generation = 0
        self._over = threading.Event()
        self._writing = threading.RLock()  # `_lost` ends the process while it has it
        self._failing = False

    def take(self) -> None:
        """Takes the lease, after a dead run's time if need be; raises UserError, naming who holds it."""
        from mae_jax.storage import gcs

        seen, since = None, time.monotonic()
        began = since
        try:
            while not self._try(seen.generation if seen and time.monotonic() - since > DEAD else 0):
                found, began = gcs.read(self._name), time.monotonic()
                if found is None:  # its run has ended
                    seen = None
                elif seen is None:
                    logger.warning("%s was left by %s; waiting to see whether that run lives: up to %g s for a sign",
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
        while not self.lost and time.monotonic() - self.looked > DEAD / 2:
            time.sleep(0.05)
        super().wait_until_verified()

    def why_unwritable(self) -> str:
        """Returns why another run may have the lease, '' where this one has it for a while yet."""
        silent = time.monotonic() - self.renewed
        return f"no sign of life could be given for {silent:.0f} s, so another run may have the workdir" * (
            silent > DEAD - RENEWED)

    def _try(self, generation: int) -> bool:
        with self._writing:  # a signal waits for the answer a little, to give back what was taken
            return not self._over.is_set() and self._write(generation, FIRST)

    def _write(self, generation: int, seconds: float) -> bool:
        """Writes the object over the one of that generation, 0 for none; False where another's is there."""
        from mae_jax.storage import gcs

        try:
            self._generation = gcs.write(self._name, self._text, seconds, generation) or 0
        except gcs.GenerationMismatch:
            found = gcs.read(self._name)
            if found is None or found.content != self._text:
                return False
            self._generation = found.generation  # ours: the answer to an earlier try was lost
        return True

    def _renew(self) -> None:
        """The thread: gives signs of life, and ends the process where another run has taken over."""
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
                except Exception as error:  # whatever it is, the thread must live
                    if not self._failing:
                        logger.warning("cannot renew the run's lease: %s; training goes on, it is tried again", error)
                    self._failing = True
                self.looked = time.monotonic()

    def _lost(self, found: Any) -> None:
        """Ends the process; `found`: the gcs.StoredObject of the run that took over, None where it has ended."""
        silent, self._generation = time.monotonic() - self.renewed, 0
        by = _who(found.content) if found else "a run that has ended since"
        line = (f"{self.folder} was taken over by {by}, after this run had given no sign of life for "
                f"{silent:.0f} s; nothing more is written")
        self._stop(line)

    def give_back(self) -> None:
        """Deletes the object, unless this was done or it is another's; a failure costs the next run a wait."""
        from mae_jax.storage import gcs

        self._over.set()
        if not self._writing.acquire(timeout=LAST):
            return
        try:
            if self._generation:
                gcs.delete(self._name, self._generation, LAST)
        except (gcs.BucketError, gcs.GenerationMismatch) as error:
            logger.warning("could not remove %s (%s): the next run waits %g s for a sign of life", self.path, error,
                           DEAD)
        finally:
            self._generation = 0
            self._writing.release()
