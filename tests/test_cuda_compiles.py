"""The CUDA engine's kernels become machine code for several GPUs, on a machine without one.

What Triton's interpreter takes, its compiler may not. It runs in a process of its own, as kernels
are either interpreted or compiled; ``python tests/test_cuda_compiles.py`` prints what they need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HOPPER, AMPERE, ADA = 90, 80, 89
SHARED = {HOPPER: 227, AMPERE: 163, ADA: 99}
"""KiB of shared memory that a program can have."""

CASES = [  # GPU, dtype, head size, rows of a tile, keys in a step, stages
    (HOPPER, "bf16", 128, 16, 64, 3),
    (HOPPER, "bf16", 128, 64, 64, 3),
    (HOPPER, "fp32", 80, 32, 32, 3),
    (AMPERE, "fp16", 64, 64, 64, 3),
    (ADA, "bf16", 256, 64, 32, 2),
    (ADA, "fp32", 256, 32, 16, 2),
]


def test_kernels_compile_and_fit_into_shared_memory(tmp_path):
    from conftest import installed  # not above: it makes Triton interpret what this file compiles

    installed("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    needs = [line.split() for line in ran.stdout.splitlines()]
    assert len(needs) == 7 * len(CASES)
    for gpu, kernel, shared in needs:
        assert int(shared) <= 1024 * SHARED[int(gpu)], kernel


def compile_all() -> None:
    """A line for each kernel: the GPU, its name, and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rapid_llm.engine.cuda import attention, batch_attention, elementwise

    def compile_one(kernel: Any, gpu: int, types: dict[str, str], **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        made = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
        print(gpu, kernel.__name__, made.metadata.shared)

    for gpu, dtype, dim, rows, block, stages in CASES:
        data, numbers = f"*{dtype}", "*fp32"
        width = triton.next_power_of_2(dim)
        parts = {"parts": numbers, "parts_lse": numbers, "lse": numbers, "state": "*i64"}
        shared = {"DIM": dim, "BLOCK": block, "CACHED": True, "WINDOWED": rows == 32}
        compile_one(
            attention._attend_part,
            gpu,
            parts | dict.fromkeys(("query", "keys", "values"), data) | {"scale": "fp32"},
            WIDTH=width,
            ROWS=rows,
            num_warps=4,
            num_stages=stages,
            **shared,
        )
        compile_one(
            attention._merge_parts,
            gpu,
            parts | {"out": data},
            COLUMNS=64,
            SLOTS=32,
            RETURNS_LSE=True,
            num_warps=4,
            num_stages=3,
            **shared,
        )
        for joined in (False, True):
            compile_one(
                elementwise._rotate_and_store,
                gpu,
                dict.fromkeys(("qkv", "cosine", "sine", "query_norm", "key_norm"), data)
                | {"epsilon": "fp32", "state": "*i64", "tokens": "*i64"},
                DIM=dim,
                WIDTH=width,
                NORMS=True,
                JOINED=joined,
                num_warps=1,
                num_stages=3,
            )
        batch = parts | dict.fromkeys(("tokens", "caches", "pieces"), "*i64")
        compile_one(
            batch_attention._attend_piece,
            gpu,
            batch | {"query": data, "scale": "fp32"},
            DIM=dim,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            WINDOWED=rows == 32,
            num_warps=4,
            num_stages=stages,
        )
        compile_one(
            batch_attention._merge_pieces,
            gpu,
            batch | {"out": data},
            DIM=dim,
            COLUMNS=64,
            SLOTS=256,
            num_warps=4,
            num_stages=3,
        )
        compile_one(
            elementwise._merge,
            gpu,
            dict.fromkeys(("one", "one_lse", "other_lse", "out", "lse"), numbers) | {"other": data},
            SIZE=dim,
            WIDTH=width,
            num_warps=1,
            num_stages=3,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    compile_all()
