"""Calls one function of bench/ and prints what it returns: python -m bench MODULE.FUNCTION JSON.

So commands measure in fresh processes (measuring.fresh). Under torchrun the first rank prints.
"""

import importlib
import json
import os
import sys

from jobs.cli import run


def main():
    name, arguments = sys.argv[1:]
    module, function = name.split(".")
    function = getattr(importlib.import_module(f"bench.{module}"), function)
    found = function(**json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


run(main)
