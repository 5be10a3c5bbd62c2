"""Shared memory: a ring of slots, each of which holds one batch."""

import errno
import mmap
import os
import re
import tempfile
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_jax.data.transforms.example import Spec
from mae_jax.errors import UserError

ALIGNMENT = 64  # bytes; JAX on CPU takes arrays with this alignment without a copy
HELD = 2  # slots that the consumer may hold while others are filled; it gets copies of further batches
NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)

Batch = dict[str, np.ndarray]


class Field(NamedTuple):
    """Location of a batch field in a slot."""

    name: str
    start: int  # bytes from the beginning of the slot
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Layout(NamedTuple):
    """Division of the memory into slots and fields."""

    slots: int
    slot_bytes: int
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, spec: Spec, rows: int, slots: int) -> "Layout":
        """Returns the layout of `slots` batches of `rows` rows.

        Args:
          spec: name → shape [B, ...] and dtype.
          rows: rows per batch here, in place of B.
          slots: number of batches.
        """
        fields, place = [], 0
        for name, struct in spec.items():
            field = Field(name, place, (rows, *struct.shape[1:]), np.dtype(struct.dtype).str)
            fields.append(field)
            place += -(-field.size // ALIGNMENT) * ALIGNMENT
        page = mmap.PAGESIZE
        return cls(slots, max(page, -(-place // page) * page), tuple(fields))

    def arrays(self, memory: mmap.mmap, slot: int) -> Batch:
        """Returns the arrays of a slot; they, and all views of them, keep one array of the slot's bytes alive."""
        whole = np.frombuffer(memory, np.uint8, self.slot_bytes, slot * self.slot_bytes)
        return {field.name: whole[field.start : field.start + field.size].view(field.dtype).reshape(field.shape)
                for field in self.fields}


def reserve(layout: Layout, fields: str) -> int:
    """Returns a file descriptor of anonymous memory, allocated in full.

    The memory has no name in /dev/shm, and does not count against the size of /dev/shm, which is small in containers;
    nothing remains however the processes end. Without full allocation, a lack of memory would show only at the first
    write to a page, which kills a process by SIGBUS.

    Args:
      layout: defines the size.
      fields: config fields to lower if memory is too small, for the message.

    Raises:
      UserError: memory is too small.
    """
    size, free = layout.slots * layout.slot_bytes, free_memory()
    text = (f"worker processes need {size} bytes of memory for {layout.slots} batches of {layout.slot_bytes}, and "
            f"{{}}; lower {fields}, or take data.workers=0")
    if size > free:
        raise UserError(text.format(f"{free} are free"))
    fd = _nameless()
    try:
        os.ftruncate(fd, size)
        if hasattr(os, "posix_fallocate"):  # macOS lacks it
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        if error.errno not in NO_ROOM:
            raise
        raise UserError(text.format(f"the system gives less ({error.strerror})")) from None
    return fd


def _nameless() -> int:
    """Opens an anonymous file in memory; on systems without such files, a temporary file that is unlinked at once."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mae_jax batches", os.MFD_CLOEXEC)
    fd, name = tempfile.mkstemp()
    os.unlink(name)
    return fd


def free_memory() -> int:
    """Returns the bytes that this process may allocate, by the machine and its control groups; 2**62 if unknown."""
    free = [2**62]
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.M):
        free.append(int(found[1]) * 1024)
    for line in _text("/proc/self/cgroup").splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = "/sys/fs/cgroup/memory" if kinds else "/sys/fs/cgroup"
        limit, used, cached = (("limit_in_bytes", "usage_in_bytes", "total_inactive_file") if kinds else
                               ("max", "current", "inactive_file"))
        for place in (f"{root}{group}", root):  # in a container the group's own folder may not be visible
            most, taken = (_text(f"{place}/memory.{name}").strip() for name in (limit, used))
            if most.isdigit() and taken.isdigit():
                again = re.search(rf"^{cached} (\d+)$", _text(f"{place}/memory.stat"), re.M)
                free.append(max(0, int(most) - int(taken) + int(again[1] if again else 0)))
    return min(free)


def _text(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


class Ring:
    """The consumer's view of the slots: which are free, and which are still in use.

    A slot becomes free when nothing refers to its arrays any more; on CPU, JAX may refer to them without a copy.
    """

    def __init__(self, layout: Layout, fd: int):
        self._layout, self._memory = layout, mmap.mmap(fd, layout.slots * layout.slot_bytes)
        self._free, self._held = deque(range(layout.slots)), set[int]()

    def take(self) -> int | None:
        """Returns a free slot, or None."""
        return self._free.popleft() if self._free else None

    def hand_out(self, slot: int) -> Batch:
        """Returns the batch in a slot: without a copy, or as a copy if the consumer holds HELD slots already."""
        arrays = self._layout.arrays(self._memory, slot)
        if len(self._held) >= HELD:
            copies = {name: array.copy() for name, array in arrays.items()}
            self._free.append(slot)
            return copies
        self._held.add(slot)
        whole = next(iter(arrays.values())).base
        weakref.finalize(whole, self._back, slot).atexit = False
        return arrays

    def _back(self, slot: int) -> None:
        self._held.discard(slot)
        self._free.append(slot)
