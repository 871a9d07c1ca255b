"""The native library."""

import os
import subprocess
import sys

from ptq4vm.backend import native


def run(code: str, **environment: str) -> str:
    """Returns the output of a process that imports from where this one does."""
    path = [str(native.LIBRARY.parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
