"""Runs `recforge` command lines in forks of a process that has imported what they need: a start takes no seconds.

The arguments are modules to import. Each line of the standard input is a JSON list: a command line's arguments, and the
file for its standard error. It answers with the child's process id, and, once it has ended, with its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from deploy.cli import main

if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        argv, errors = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main(argv))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
