"""Kernels are compiled once per machine, and again when any of the kernels' sources has changed."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from embeddings.kernels import compiled
compiled.__file__ = str(Path(sys.argv[1]) / "compiled.py")
import outer
print(outer.twice_inner(1), int(bool(outer.twice_inner.stats.cache_hits)))
"""


def test_a_change_of_a_kernel_that_another_calls_compiles_both(tmp_path):
    def run():
        ran = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        result = subprocess.run(ran, capture_output=True, text=True, check=True, timeout=120)
        return result.stdout.split()

    def write(inner):
        (tmp_path / "inner.py").write_text(
            f"from embeddings.kernels.compiled import compiled\n@compiled\ndef inner(x):\n    return x + {inner}\n"
        )

    (tmp_path / "outer.py").write_text(
        "from embeddings.kernels.compiled import compiled\n"
        "from inner import inner\n"
        "@compiled\ndef twice_inner(x):\n    return 2 * inner(x)\n"
    )
    write(inner=10)
    assert run() == ["22", "0"]
    assert run() == ["22", "1"]
    write(inner=20)
    assert run() == ["42", "0"]
    assert run() == ["42", "1"]
