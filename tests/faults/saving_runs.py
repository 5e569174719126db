"""A trainer of a small model that stands before a save, and what must be on the disk whatever happens to that save."""

import shutil
from pathlib import Path

from train_doubles import content, make_trainer

from arfast.train import checkpoint as ckpt


class SavingRun:
    """A run with a checkpoint of step 1 on the disk, and everything of step 2 in memory."""

    def __init__(self, root: Path, **config):
        self.root = root
        self.trainer = make_trainer(root, max_steps=3, **{"keep_last": 2} | config)
        self._step(0)
        self.trainer.save()
        self._step(4)
        self.paths = [root / f"step-{step:08d}" for step in (1, 2)]
        shutil.copytree(root, self._aside)
        self.first = content(self.paths[0])
        self.save()
        self.second = content(self.paths[1])
        self.restore()

    def _step(self, position):
        self.trainer.step([self.trainer.datasets["train"].batch(position, 4)])

    @property
    def _aside(self):
        return self.root.with_name(self.root.name + "-aside")

    def restore(self):
        """As it was before the save."""
        shutil.rmtree(self.root)
        shutil.copytree(self._aside, self.root)

    def save(self):
        """Step 2, as `Trainer.fit` does it."""
        with ckpt.lock_directory(self.root), self.trainer._saver as saver:
            saver.save()

    def check(self, may_lose_first=False):
        """Whole checkpoints only, one at least, nothing beside them once the next run has begun; whether 2 is there."""
        with ckpt.lock_directory(self.root):
            found = ckpt.list_checkpoints(self.root)
        assert sorted(self.root.iterdir()) == sorted(found)
        assert found and set(found) <= set(self.paths)
        assert may_lose_first or self.paths[0] in found
        for path, expected in zip(self.paths, (self.first, self.second)):
            assert path not in found or content(path) == expected, path
        assert ckpt.latest_checkpoint(self.root, report=refuse) == found[-1]
        return self.paths[1] in found


def refuse(text):
    raise AssertionError(text)
