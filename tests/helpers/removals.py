"""Counts what a process removes, and kills it at one of the steps."""

# what a script begins with
IN_CHILD = """
import os, signal, sys

def in_child(work, kill_at=None, until=None):
    'Exit status, and how many files and folders were removed, before a file whose name ends with until was opened.'
    receive, send = os.pipe()
    if not (pid := os.fork()):
        removed, counting = 0, True
        def hook(event, arguments):
            nonlocal removed, counting
            if event == 'open' and until is not None and str(arguments[0]).endswith(until):
                counting = False
            if event in ('os.remove', 'os.rmdir') and counting:
                removed += 1
                if removed == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        status = work()
        os.write(send, str(removed).encode())
        os._exit(status)
    os.close(send)
    with open(receive) as stream: said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(said) if said else None
"""
