"""Faults that tests put into processes by way of PYTHONPATH. OSCAR_FAULT says which: `crash`, `gpu`, `die`, `kill`."""

import builtins
import os
import signal
import sys

FAULT, ONCE = os.environ.get("OSCAR_FAULT", ""), os.environ.get("OSCAR_FAULT_ONCE", "")
MARK = b"this image kills"


def first_time():
    """Whether this is the first process to ask, on this machine."""
    try:
        os.close(os.open(ONCE, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def crash_on_mark():
    """Let Pillow die of a signal when it opens a file with a mark in it, as a decoder with a bug would."""
    import PIL.Image

    opened = PIL.Image.open

    def open_or_die(file, *args, **keywords):
        if MARK in file.getvalue():
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a bug would
        return opened(file, *args, **keywords)

    PIL.Image.open = open_or_die


def fail_in_detect(fail):
    """Let `fail(inputs)` run before the detector does, in whatever process imports it."""
    imported = builtins.__import__

    def importing(*args, **keywords):
        module = imported(*args, **keywords)
        memory = sys.modules.get("oscar_extract.out_of_memory")
        if hasattr(memory, "detect") and not hasattr(memory, "fault"):
            memory.fault, detect = fail, memory.detect
            memory.detect = lambda detector, inputs, selection: (fail(inputs), detect(detector, inputs, selection))[1]
        return module

    builtins.__import__ = importing


def lose_the_gpu(inputs, calls=[]):  # noqa: B006
    """Fail as torch does when a kernel has crashed, once, at some image in the middle."""
    calls.append(1)
    if len(calls) == 4 and first_time():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


def die_of_wide_images(inputs):
    """Be killed, as for too much memory, whenever an image of one shape comes."""
    if any(i.width == 333 for i in inputs):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_before_change(number):
    """Be killed before the given change of a checkpoint: one gets a name, loses it, or is about to be deleted."""
    left = number

    def count(event, arguments):
        nonlocal left
        if event in ("os.rename", "shutil.rmtree") and "checkpoint-" in os.path.basename(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if FAULT == "crash":
    crash_on_mark()
elif FAULT == "gpu":
    fail_in_detect(lose_the_gpu)
elif FAULT == "die":
    fail_in_detect(die_of_wide_images)
elif FAULT == "kill":
    kill_before_change(int(os.environ["OSCAR_FAULT_CHANGE"]))
