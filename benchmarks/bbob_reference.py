"""Writes the reference values that tests/problems/test_bbob.py compares with: pip install ioh, then run this.

    python benchmarks/bbob_reference.py

The table holds, for every function, dimension and instance below, ioh's value at three points (two in the box, one
that is partly outside), and ioh's optimum.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import ioh
import numpy as np

DIMENSIONS = (2, 5, 10, 20)
INSTANCES = (1, 2, 3, 15)
TABLE = Path(__file__).resolve().parents[1] / "tests" / "problems" / "bbob_ioh.json"


def main() -> None:
    rng = np.random.default_rng(2009)
    points = {}
    for d in DIMENSIONS:
        x = np.round(rng.uniform(-5, 5, (3, d)), 4)
        x[2, 0] = 6.5
        points[str(d)] = x.tolist()
    rows = []
    for f in range(1, 25):
        for d in DIMENSIONS:
            for instance in INSTANCES:
                problem = ioh.get_problem(f, instance=instance, dimension=d)
                values = [problem(x) for x in points[str(d)]]
                rows.append([f, d, instance, problem.optimum.y, *values])
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    header = {
        "package": f"ioh {version('ioh')}",
        "columns": "f, d, instance, f_opt, values at the points of d",
    }
    TABLE.write_text(
        json.dumps({**header, "points": points})[:-1] + ',\n  "rows": [\n    ' + lines + "\n  ]}\n"
    )


if __name__ == "__main__":
    main()
