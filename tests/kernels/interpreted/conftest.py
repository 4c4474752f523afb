"""Process A: Triton's interpreter with `interp`'s checks. `test_triton_processes.py` starts it.

python -m pytest tests/kernels/interpreted
"""

from __future__ import annotations

import interp  # noqa: F401  (before anything imports Triton)
