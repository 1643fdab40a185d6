"""Our package `kernels` has the import name of another one, which libraries look for by its version."""

import subprocess
import sys

import kernels


def test_the_version_says_that_the_other_package_is_not_installed():
    major, minor = (int(part) for part in kernels.__version__.split(".")[:2])
    assert (major, minor) < (0, 18)


def test_transformers_imports_beside_it():
    program = (
        "import kernels, transformers\n"
        "from transformers import AutoConfig\n"
        "assert kernels.linear_attention and transformers.__version__"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
