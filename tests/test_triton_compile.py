"""The machine code of the Triton kernels, made by Triton's own compiler for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPILE = r"""
import os
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inrun_megatron.optimizers import triton_adam
from inrun_megatron.dots import triton_blocks, triton_elementwise, triton_linear, triton_norms

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# A layer's are multiples of 16, which Triton looks for at every launch; Triton 3.6 spills a few registers without.
SIZES = ("features_in", "features_out", "tokens", "a_step", "b_step")

def compiled(kernel, warps, types, constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n.isupper() else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(
        kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in SIZES},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    # Directions lie a model's parameters apart, and with several targets further than int32 counts.
    found = re.findall(r".*muli .*%\w+_target\b.* : i32.*", made.asm["ttir"])
    assert not found, f"an offset to a direction in int32: {found}"
    return made

for weights, segments, even, targets, precise in (
    (2**22, 4, True, 1, False), (2**26, 4, True, 1, False), (2**22, 4, True, 4, False), (2**26, 4, True, 4, False),
    (2**26, 4, True, 1, True), (2**22, 40, True, 1, False),
    (2**22, 4, False, 1, False), (2**26, 4, False, 1, False), (2**22, 40, False, 1, False),
):
    tile = triton_linear.tile(weights, segments, 4 if precise else 2)
    linear = compiled(
        triton_linear._kernel, tile.warps,
        {"a_desc": f"tensordesc<bf16[{tile.tokens},{tile.into}]>", "b_desc": f"tensordesc<bf16[{tile.tokens},{tile.out}]>",
         "direction_desc": f"tensordesc<{'fp32' if precise else 'bf16'}[1,{tile.out},{tile.into}]>",
         "grad_ptr": "*bf16", "segments_ptr": "*i32"},
        {"TARGETS": targets, "BATCH_FIRST": False, "EVEN": even, "EDGES": False, "WIDEN": False,
         "TWO_ACCUMULATORS": segments > triton_linear.SEGMENTS_PER_ACCUMULATOR,
         "BLOCK_OUT": tile.out, "BLOCK_IN": tile.into, "BLOCK_TOKENS": tile.tokens, "TILE_ROWS": 8, "STAGES": tile.stages},
    )
    # The tensor cores multiply, the copy engine loads, and no register is spilled to the stack.
    cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    cubin.write_bytes(linear.asm["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    fine = "wgmma" in linear.asm["ptx"] and "cp.async.bulk.tensor" in linear.asm["ptx"] and "STACK:0" in used
    # A processor's shared memory holds what a program needs; both factors are read there (what else is loaded from
    # it are directions), and the products run on while the next tiles are waited for.
    fine &= linear.metadata.shared <= 227 * 1024
    if even:
        fine &= linear.asm["ttgir"].count("ttg.local_load") == targets and "wait_group.sync.aligned 1" in linear.asm["ptx"]
    print(fine)
blocks = {"STRETCH": 128, "BLOCK_TOKENS": 32, "BLOCK_FEATURES": 128}
for kernel, types, constants in [
    (triton_elementwise._vector_kernel, {"b_ptr": "*bf16", "x_ptr": "*bf16", "segments_ptr": "*i32"},
     {"SCALE": True, "SHIFT": True, "MEAN": True, "STATISTICS": True}),
    (triton_norms._kernel, {"b_ptr": "*bf16", "x_ptr": "*bf16"}, {"MEAN": True}),
    (triton_elementwise._embedding_kernel, {"b_ptr": "*bf16", "ids_ptr": "*i64", "segments_ptr": "*i32"}, {}),
]:
    print(len(compiled(kernel, 4, types, {**constants, **blocks}).asm["cubin"]) > 0)
numbers = {n: "fp32" for n in ("gain", "eps", "seen", "fresh", "share", "momentum", "decay")}
for kernel, types, constants in [
    (triton_adam._condition_kernel, {**numbers, "clips_ptr": "*fp64", "out_ptr": "*bf16"}, {"TERMS": True}),
    (triton_adam._idle_kernel, {**numbers, "out_ptr": "*bf16"}, {}),
    (triton_adam._inner_kernel, {"direction_ptr": "*bf16"}, {}),
    (triton_blocks._kernel, {"direction_ptr": "*bf16", "grad_ptr": "*bf16"}, {"TARGETS": 1, "SUM": True, "ADD": False}),
]:
    made = compiled(kernel, 4, types, {**constants, "BLOCK": triton_adam.BLOCK})
    print(made.n_spills == 0 if hasattr(made, "n_spills") else len(made.asm["cubin"]) > 0)
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Triton's compiler makes machine code for an H100/H200 (sm_90) on any machine; the product runs on tensor cores."""
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ran.stdout.split() == ["True"] * 16, ran.stderr
