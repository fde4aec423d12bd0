"""Memory of a GPU, which refuses what a correct kernel does not do.

N accesses at a time, all of the same number of bytes. The threads of a warp are taken to run in step, so what they do
to each other without a barrier is not looked at.
"""
from typing import List, NamedTuple

import numpy as np

Array = np.ndarray


class Fault(Exception):
    """Something that a correct kernel does not do. `access` is the number of the first access that does it."""

    def __init__(self, message: str, access: int = 0) -> None:
        super().__init__(message)
        self.access = access


class OutOfBounds(Fault):
    """An access outside a tensor's storage, or outside the kernel's shared memory."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class UnwrittenRead(Fault):
    """A read of what nothing wrote."""


class EarlyAccess(Fault):
    """A read or write of shared memory that a copy (cp.async) is on its way to."""


class DataRace(Fault):
    """Two warps access the same shared memory with no barrier in between, or two programs the same place of a tensor,
    and one of them writes."""


def refuse(kind: type, message: str, bad: Array) -> None:
    """Raises if any of the N accesses is bad."""
    if bad.any():
        raise kind(message, int(bad.argmax()))


def _check_alignment(address: Array, size: int) -> None:
    refuse(Misaligned, f'expected addresses that are multiples of {size}', address % size != 0)


class Place(NamedTuple):
    """Where N threads access memory, in bytes, and which program and warp they are of."""
    program: Array
    address: Array
    warp: Array


class GlobalMemory:
    """Memory that holds the storages of tensors, with gaps between them that are not to be accessed."""

    _FIRST = 1 << 40  # addresses are far from small integers, and don't fit 32 bits
    _GAP = 4096
    _NOBODY = -1

    def __init__(self, storages: List[Array]) -> None:
        """
        Args:
            storages: Arrays of bytes, which are copied.
        """
        places = []
        top = self._GAP
        for storage in storages:
            places.append(slice(top, top + storage.size))
            top += -(-storage.size // self._GAP) * self._GAP + self._GAP
        self.addresses = [self._FIRST + place.start for place in places]
        self._places = places
        self._bytes = np.zeros(top, np.uint8)
        self._exists = np.zeros(top, np.bool_)
        self._writer = np.full(top, self._NOBODY)  # the program that wrote the number that begins at a byte
        for place, storage in zip(places, storages):
            self._bytes[place] = storage
            self._exists[place] = True

    def storage(self, number: int) -> Array:
        """The present contents of one of the storages."""
        return self._bytes[self._places[number]]

    def load(self, place: Place, dtype: type, count: int) -> Array:
        """`count` numbers from each address. (N, count)"""
        index = self._index(place, np.dtype(dtype).itemsize, count)
        self._check_race('reads what another program wrote', place, index * np.dtype(dtype).itemsize)
        return self._bytes.view(dtype)[index]

    def store(self, place: Place, values: Array) -> None:
        """Values are (N, count)."""
        index = self._index(place, values.itemsize, values.shape[1])
        self._check_race('writes what another program wrote', place, index * values.itemsize)
        self._bytes.view(values.dtype)[index] = values
        self._writer[index * values.itemsize] = place.program[:, None]
        self._check_race('writes what another program writes', place, index * values.itemsize)

    def _check_race(self, message: str, place: Place, first_bytes: Array) -> None:
        writer = self._writer[first_bytes]
        refuse(DataRace, message, ((writer != self._NOBODY) & (writer != place.program[:, None])).any(1))

    def _index(self, place: Place, itemsize: int, count: int) -> Array:
        size = itemsize * count
        offset = place.address - self._FIRST
        _check_alignment(offset, size)
        inside = (offset >= 0) & (offset + size <= self._bytes.size)
        # gaps are wider than any access, so its ends tell
        first, last = (np.where(inside, x, 0) for x in (offset, offset + size - 1))
        refuse(OutOfBounds, 'expected addresses in the storage of a tensor',
               ~(inside & self._exists[first] & self._exists[last]))
        return offset[:, None] // itemsize + np.arange(count)


class SharedMemory:
    """The shared memory of several programs.

    For each granule, the smallest piece that the kernel accesses, it keeps who read and wrote it last. That is a
    stamp, epoch * 64 + warp, where a barrier begins a new epoch. Two different stamps of one epoch, one of a write, are
    a race. Copies (cp.async) may write at any time between their start and the wait for their group.
    """

    _WARPS = 64
    _SEVERAL = 63  # stands for the readers if there are many; there are no more than 32 warps
    _NEVER = -1

    def __init__(self, programs: int, size: int, granule: int) -> None:
        self._size, self._granule = size, granule
        self._row = -(-size // 16) * 16  # bytes per program, whole accesses
        self._bytes = np.zeros(programs * self._row, np.uint8)
        granules = self._bytes.size // granule
        self._written = np.full(granules, self._NEVER)
        self._read = np.full(granules, self._NEVER)
        self._copied = np.zeros(granules, np.int64)  # the last group that copies to it
        self._epoch = np.zeros(programs, np.int64)
        self._groups = np.zeros(programs, np.int64)  # started by cp.async.commit_group
        self._arrived = np.zeros(programs, np.int64)  # waited for
        self._copies = []

    def load(self, place: Place, dtype: type, count: int) -> Array:
        """`count` numbers from each address. (N, count)"""
        size = np.dtype(dtype).itemsize * count
        granules = self._granules(place, size)
        self._check_arrived(place, granules)
        written = self._written[granules]
        refuse(UnwrittenRead, 'reads shared memory that nothing wrote', (written == self._NEVER).any(1))
        self._check_race('reads what another warp wrote with no barrier in between', place, written)
        self._note_read(place, granules)
        return self._bytes.view(dtype)[self._index(place, dtype, count)]

    def store(self, place: Place, values: Array) -> None:
        """Values are (N, count)."""
        granules = self._granules(place, values.itemsize * values.shape[1])
        self._check_arrived(place, granules)
        self._check_write(place, granules, values)
        self._write(place, granules, values)

    def start_copy(self, place: Place, values: Array) -> None:
        """Values that are written once their group is waited for. (N, count)"""
        granules = self._granules(place, values.itemsize * values.shape[1])
        self._check_arrived(place, granules)
        self._check_write(place, granules, values)
        self._copied[granules] = self._groups[place.program][:, None] + 1
        self._copies.append((place, values, self._groups[place.program] + 1))

    def end_group(self, programs: Array) -> None:
        """The copies since the last are one group, in each program that takes part. (programs,) bool"""
        self._groups[programs] += 1

    def wait(self, programs: Array, pending: int) -> None:
        """Until at most `pending` groups are on their way."""
        self._arrived[programs] = np.maximum(self._arrived, self._groups - pending)[programs]
        copies, self._copies = self._copies, []
        for place, values, group in copies:
            there = group <= self._arrived[place.program]
            for part, use in ((there, self._end_copy), (~there, self._keep_copy)):
                if part.any():
                    use(Place(*(x[part] for x in place)), values[part], group[part])

    def barrier(self, programs: Array) -> None:
        """All warps of the programs meet."""
        self._epoch[programs] += 1

    def _end_copy(self, place: Place, values: Array, group: Array) -> None:
        self._write(place, self._granules(place, values.itemsize * values.shape[1]), values)

    def _keep_copy(self, place: Place, values: Array, group: Array) -> None:
        self._copies.append((place, values, group))

    def _granules(self, place: Place, size: int) -> Array:
        """The granules of each access. (N, size / granule)"""
        _check_alignment(place.address, size)
        refuse(OutOfBounds, f'expected addresses in the {self._size} bytes of shared memory',
               (place.address < 0) | (place.address + size > self._size))
        first = (place.program * self._row + place.address) // self._granule
        return first[:, None] + np.arange(size // self._granule)

    def _index(self, place: Place, dtype: type, count: int) -> Array:
        first = (place.program * self._row + place.address) // np.dtype(dtype).itemsize
        return first[:, None] + np.arange(count)

    def _stamp(self, place: Place) -> Array:
        return (self._epoch[place.program] * self._WARPS + place.warp)[:, None]

    def _races(self, place: Place, before: Array) -> Array:
        """Of the accesses with these stamps before, those by other warps in the same epoch."""
        return (before >= (self._epoch[place.program] * self._WARPS)[:, None]) & (before != self._stamp(place))

    def _check_race(self, message: str, place: Place, before: Array) -> None:
        refuse(DataRace, message, self._races(place, before).any(1))

    def _check_arrived(self, place: Place, granules: Array) -> None:
        refuse(EarlyAccess, 'accesses what a copy is on its way to, with no wait for it',
               (self._copied[granules] > self._arrived[place.program][:, None]).any(1))

    def _check_write(self, place: Place, granules: Array, values: Array) -> None:
        self._check_race('writes what another warp read with no barrier in between', place, self._read[granules])
        # several warps may write the same value, as they do where a layout holds it several times
        differs = self._bytes.view(values.dtype)[self._index(place, values.dtype, values.shape[1])] != values
        refuse(DataRace, 'writes what another warp wrote with no barrier in between',
               self._races(place, self._written[granules]).any(1) & differs.any(1))

    def _write(self, place: Place, granules: Array, values: Array) -> None:
        index, words = self._index(place, values.dtype, values.shape[1]), self._bytes.view(values.dtype)
        words[index] = values
        refuse(DataRace, 'writes another value than another thread at the same time', (words[index] != values).any(1))
        self._written[granules] = self._stamp(place)

    def _note_read(self, place: Place, granules: Array) -> None:
        stamp = np.broadcast_to(self._stamp(place), granules.shape)
        several = stamp - place.warp[:, None] + self._SEVERAL
        self._read[granules] = np.where(self._races(place, self._read[granules]), several, stamp)
        # of warps that read the same granule at the same time, one has left its stamp
        mixed = self._read[granules] != stamp
        self._read[granules[mixed]] = several[mixed]
