"""The kernels run on the CPU, in Triton's interpreter, in a process of their own.

`TRITON_INTERPRET` must be set before Triton is imported, and changes every kernel of the process: `make test-ci` runs
this folder by itself with it set, and everywhere else the folder is left out.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
