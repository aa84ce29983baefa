"""Says which packages an interpreter has, and whether they can be imported.

    PYTHON ask_python.py DISTRIBUTION[=MODULE] ...

The interpreter is any Python 3.8 or newer, so this is a script of the standard library alone. A line of JSON goes out
before each import and one after it: whoever reads knows which one crashed or hangs."""

import importlib
import importlib.metadata
import json
import os
import sys
import time


def main():
    # imports may print
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**what):
        out.write(json.dumps(what) + "\n")
        out.flush()

    # the directory of this script holds modules of any name
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    say(python=".".join(map(str, sys.version_info[:3])))
    for argument in sys.argv[1:]:
        distribution, _, module = argument.partition("=")
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = None
        say(package=distribution, version=version)
        if not module:
            continue
        start = time.time()
        say(begins=distribution)
        try:
            importlib.import_module(module)
        # a package may do anything while it is imported
        except BaseException as error:
            say(package=distribution, error=f"{type(error).__name__}: {error}")
        else:
            say(package=distribution, seconds=time.time() - start)


if __name__ == "__main__":
    main()
