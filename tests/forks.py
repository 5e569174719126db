"""Children of this process that are forked, so that an accident costs milliseconds and not the import of torch."""

import errno
import os
import resource
import signal
import sys
import threading
import traceback

from tqdm import tqdm


def fork(work):
    """The process id of a child, leader of its own group, that runs ``work`` and ends with status 0, or 1."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())  # its own lock is one for all processes: a killed child keeps it for ever
        work()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child):
    """Exit status of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number, folder):
    """Ends this process, without clean-up, just before its call ``number`` that changes the folder or waits for it."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == number:
            os._exit(9)

    def audit(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        )
        if changes and str(folder) in str(arguments[0]):
            count()

    os.fsync = lambda descriptor: count()
    sys.addaudithook(audit)


def with_full_disk(work, limit, sentence):
    """``work`` under a limit on the size of files: it must fail where a full disk does, with a sentence; status 7."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        work()
    except OSError as error:
        assert error.errno == errno.EFBIG, error
        assert sentence in str(error)
        os._exit(7)
