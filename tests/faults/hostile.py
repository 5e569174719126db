"""What every file that may be hostile is held to: it loads or is refused in one sentence of ours, and nothing else."""

import codecs
import contextlib
import json
import os
import random
import re
import resource
import sys
import time
import warnings

from mutations import mutate_bytes, mutate_value, to_json

from arfast.train import CheckpointError

REFUSALS = (ValueError, FileNotFoundError, CheckpointError)
SENTENCE = re.compile(r"[A-Za-z_][\w.]*(?: .{1,600}?)?: .* must .*, got:? .*")
LIMIT_SECONDS, LIMIT_BYTES = 1.0, 64 << 20
# Events of sys.addaudithook that nothing in a file may bring about; "open" is looked at by path.
FORBIDDEN = tuple(
    "exec compile socket. subprocess. os.system os.exec os.fork os.posix_spawn pickle. marshal. ctypes.dlopen "
    "os.putenv os.remove os.rename os.mkdir os.chmod urllib.".split()
)

_watched, _violations = [], []
for _name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
    codecs.lookup(_name)  # modules that Python loads when JSON is first written so


def _audit(event, arguments):
    if not _watched:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        if not os.path.realpath(os.fspath(arguments[0])).startswith(_watched[-1]):
            _violations.append((event, arguments))
    elif event.startswith(FORBIDDEN) and "<frozen" not in str(arguments):
        _violations.append((event, str(arguments)[:200]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(directory):
    """Nothing that is forbidden happens in here, and no file outside the directory is opened."""
    _watched.append(os.path.realpath(directory))
    try:
        yield
    finally:
        _watched.pop()
    found, _violations[:] = _violations[:], []
    assert not found, found


def attempt(load, directory, describe):
    """Load; 1 if it was refused: one line of the usual form, within the time and the memory that the bars allow."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        with watched(directory), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(directory)
        refused = 0
    except REFUSALS as error:
        refused = 1
        assert SENTENCE.fullmatch(str(error)) and len(str(error)) < 1500, (describe, type(error), str(error)[:3000])
    seconds = time.thread_time() - start
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert seconds < LIMIT_SECONDS, (describe, seconds)
    assert growth <= LIMIT_BYTES, (describe, growth)
    return refused


def fuzz(directory, names, mutate, load, count, seed):
    """Load variants of one file at a time; returns how many were refused."""
    originals = {name: (directory / name).read_bytes() for name in names}
    generator, refused = random.Random(seed), 0
    for i in range(count):
        name = generator.choice(names)
        data = mutate(generator, originals[name])
        (directory / name).write_bytes(data)
        refused += attempt(load, directory, f"seed {seed}, input {i}, {name}")
        (directory / name).write_bytes(originals[name])
    return refused


def mutate_json(generator, data):
    if generator.random() < 0.3:
        return mutate_bytes(generator, data)
    value = json.loads(data)
    for _ in range(generator.randint(1, 3)):
        value = mutate_value(generator, value)
    return to_json(generator, value)
