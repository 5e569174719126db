"""Groups of equal keys among more records than fit into memory: partitions by key on the disk, sorted one at a time."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# The largest partition that is sorted at once, if keys are spread evenly; a group of equal keys stays together.
PARTITION_BYTES = 16 << 20
_MAX_PARTITIONS = 4096


class Spill:
    """Records with a uint64 field "key", spread over files by the leading bits of the key.

    Use it as a context: the directory, which must not exist, is removed at the end.
    """

    def __init__(self, directory: Path, dtype: np.dtype, expected_records: int):
        self._directory, self._dtype = directory, dtype
        self._num = min(expected_records * dtype.itemsize // PARTITION_BYTES + 1, _MAX_PARTITIONS)

    def __enter__(self) -> "Spill":
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def add(self, records: np.ndarray) -> None:
        """Appends records [N] of the dtype."""
        partitions = (records["key"] >> np.uint64(32)) * np.uint64(self._num) >> np.uint64(32)
        order = np.argsort(partitions, kind="stable")
        bounds = np.searchsorted(partitions[order], np.arange(self._num + 1))
        for partition in np.flatnonzero(np.diff(bounds)).tolist():
            with open(self._directory / str(partition), "ab") as file:
                file.write(records[order[bounds[partition] : bounds[partition + 1]]].tobytes())

    def groups(self) -> Iterator[np.ndarray]:
        """The records of each key that several have, in the order in which they were added."""
        for partition in range(self._num):
            path = self._directory / str(partition)
            if not path.exists():
                continue
            records = np.fromfile(path, self._dtype)
            records = records[np.argsort(records["key"], kind="stable")]
            starts = np.flatnonzero(np.concatenate([[True], records["key"][1:] != records["key"][:-1]]))
            ends = np.append(starts[1:], len(records))
            for group in np.flatnonzero(ends - starts > 1).tolist():
                yield records[starts[group] : ends[group]]
