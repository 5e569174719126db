"""The hidden directory of unfinished work: one folder per stage, named after all that the stage's result depends on."""

import json
import shutil
from pathlib import Path

from arfast.data.files import write_file

_COMPLETE = "complete.json"
_KEY_CHARACTERS = 24


class Workspace:
    """Folders of stages beside the output directory, on the same disk. Its user holds the lock of the output directory.

    A folder is used again when its key is the same; ``complete.json``, written last, says that the stage is done.
    """

    def __init__(self, out_dir: Path):
        self.path = out_dir.with_name(f".{out_dir.name}.prepare")

    def stage(self, name: str, key: str) -> Path:
        """The folder of a stage; those that other recipes left behind go, and so do files that were being written."""
        self.path.mkdir(exist_ok=True)
        folder = self.path / f"{name}-{key[:_KEY_CHARACTERS]}"
        for other in self.path.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        sweep(folder)
        return folder

    def close(self) -> None:
        """Removes all."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close_if_empty(self) -> None:
        """Removes the folders unless they hold work that is worth continuing with."""
        if not any(self.path.glob("*/*.json")):
            self.close()


def sweep(folder: Path) -> None:
    """Removes what was being written at any depth when a process was killed."""
    for stale in list(folder.rglob(".*.tmp-*")):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)


def result_of(folder: Path) -> dict | None:
    """What ``complete`` recorded, None when the stage is not done."""
    path = folder / _COMPLETE
    return json.loads(path.read_bytes()) if path.exists() else None


def complete(folder: Path, result: dict) -> dict:
    """Marks a stage as done."""
    write_file(folder / _COMPLETE, json.dumps(result).encode())
    return result


def reopen(folder: Path) -> None:
    """Takes the mark back before the stage is done again."""
    (folder / _COMPLETE).unlink(missing_ok=True)
