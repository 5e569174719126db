"""Whether time grows in proportion to an input."""

import gc
import time


def seconds(function, short, long):
    """Of this thread, for ``short`` and for ``long``, which is ten times as large: the least of three for each.

    Ten calls with ``short`` take about as long as one with ``long``, so that whatever else the processor does meanwhile
    weighs on both alike; and the heap that other tests left behind is not searched for garbage in one of them.
    """
    inputs = {"short": [short] * 10, "long": [long]}
    times = dict.fromkeys(inputs, float("inf"))
    gc.freeze()
    try:
        for _ in range(3):
            for name, arguments in inputs.items():
                start = time.thread_time()
                for argument in arguments:
                    function(argument)
                times[name] = min(times[name], (time.thread_time() - start) / len(arguments))
    finally:
        gc.unfreeze()
    return times["short"], times["long"]
