"""The machine code that Triton makes of each rule for an H100 or H200 (sm_90), without such a device.

For the kernel `apply` in its main form (addresses that are multiples of 16 bytes): loads and stores of 16 bytes,
registers a thread, spilled bytes, from the PTX and from NVIDIA's assembler. Nothing is run or timed.

    python benchmarks/triton_code.py            # a table, recorded under benchmarks/results/
    python benchmarks/triton_code.py --json     # the rows alone
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridopt.engines import gpu
from hybridopt.engines._variant import Variant
from hybridopt.optim._device_plan import BLOCK
from hybridopt.rules import Rule

RULES = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adan",
    "adopt",
    "asgd",
    "lion",
    "nadam",
    "radam",
    "rmsprop",
]
RULES += ["rprop", "sgd"]
SIGNATURE = {"table": "*i64", "gradients": "*i64", "chunks": "*i32", "numbers": "*fp64", "skip": "*fp32"}
SIGNATURE |= {"BLOCK": "constexpr", "ALIGNED": "constexpr"}


def variant(rule: Rule, dtype: str, **extra: Any) -> Variant:
    """All flags off but momentum and decay, which read more."""
    flags = tuple((flag, flag in ("heavy", "decay", "momentum", "decoupled")) for flag in rule.flags)
    return Variant(flags, dtype, dtype, (dtype,) * len(rule.active(dict(flags))), **extra)


def measure(name: str, rule: Rule, chosen: Variant) -> dict[str, Any]:
    """Compile and read the result."""
    source = ASTSource(
        fn=gpu.compiled(rule, chosen).apply,
        signature=SIGNATURE,
        constexprs={(5,): BLOCK, (6,): True},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [str(ptxas), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    arrays = 1 + len(chosen.states)
    return {
        "rule": name,
        "dtype": chosen.weight,
        "stochastic": chosen.stochastic,
        "arrays read": arrays + 1,
        "arrays written": arrays,
        "loads of 16 bytes": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "stores of 16 bytes": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "registers": int(re.findall(r"Used (\d+) registers", told)[0]),
        "spilled bytes": sum(map(int, re.findall(r"(\d+) bytes spill", told))),
    }


def main() -> None:
    """Compile every rule."""
    rows = []
    for name in RULES:
        rule = importlib.import_module(f"hybridopt.rules.{name}").RULE
        rows += [measure(name, rule, variant(rule, dtype)) for dtype in ("float32", "bfloat16")]
    adam = importlib.import_module("hybridopt.rules.adam").RULE
    rows += [
        measure("adam", adam, variant(adam, dtype, stochastic=True)) for dtype in ("bfloat16", "float16")
    ]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    target = Path(__file__).parent / "results" / "triton_code.json"
    target.write_text(
        json.dumps({"triton": triton.__version__, "arch": "sm_90a", "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
