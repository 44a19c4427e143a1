"""The Triton kernels pass Triton's compiler and NVIDIA's assembler for real cards, which needs no card; nothing runs."""

from __future__ import annotations

import os

import pytest
import torch
from fewstep_kernels.attention import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"),
]
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FLOAT32 = ("LSE", "R", "DROP", "BETA", "BIAS_AT")


def signature(kernel, dtype: torch.dtype, constants: dict) -> dict[str, str]:
    kinds = {name: POINTERS[dtype] if name.isupper() else "i32" for name in kernel.arg_names}
    kinds |= dict.fromkeys(FLOAT32, "*fp32") | {"LENGTHS_AT": "*i32", "scale": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    return {name: kinds[name] for name in kernel.arg_names}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name, dim, dtype, moved",
    [
        ("attend", 64, torch.bfloat16, True),
        ("attend", 72, torch.float16, False),
        ("queries_back", 64, torch.bfloat16, True),
        ("keys_back", 128, torch.bfloat16, True),
        ("keys_back", 64, torch.bfloat16, False),
    ],
)
def test_kernels_compile_and_assemble_for_the_cards_in_use(name, dim, dtype, moved, capability):
    pytest.importorskip("triton")
    import triton
    from fewstep_kernels.attention import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, back = getattr(kernels, name), name != "attend"
    width = max(16, 1 << (dim - 1).bit_length())
    tile = launch.tiles(width, dtype, moved, back)
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    constants = {
        "D": dim,
        "DP": width,
        "CAUSAL": True,
        "BIAS": True,
        "LENGTHS": True,
        "INTERP": False,
        "PRECISION": "ieee",
    }
    constants |= tile | dict.fromkeys(("HAS_TQ", "HAS_TK", "HAS_TV"), moved)
    constants |= {"HAS_GO": True, "HAS_GT": moved} if back else {}
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature(kernel, dtype, constants), places)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared <= {80: 163, 90: 227}[capability] * 1024  # of one block
