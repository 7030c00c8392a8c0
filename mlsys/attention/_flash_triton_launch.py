"""How the kernels of `mlsys.attention.flash_triton` are launched: grids, strides, and the tiles that may be tried.

See also:
    `mlsys.attention.flash_triton` (the kernels, explained).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mlsys.attention import _flash_triton_backward as backward_kernels
from mlsys.attention._flash_triton_forward import forward as forward_kernel
from mlsys.attention._flash_triton_tiles import LOG2E
from mlsys.kernels._triton import Config, Specimen, at, config, next_power_of_2
from mlsys.kernels._triton_tune import size, tuned

LARGEST = 256  # numbers of a head
SUMS = config(BLOCK_M=32, warps=4, stages=1)


class Configs(NamedTuple):
    """Settings to force, of each kernel: None leaves it to the tuner."""

    forward: Config | None = None
    keys: Config | None = None  # the kernel of dK and dV
    queries: Config | None = None  # of dQ


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention, checked: tensors are (b, heads, ·, ·), or (1, heads, total, ·) if they are packed."""

    batch: int
    t: int  # of the longest sequence, as s
    s: int
    left: int  # −1 for no bound, as right
    right: int
    scale: float  # not negative
    precision: str
    configs: Configs
    ends_q: Tensor | None = None  # int32
    ends_k: Tensor | None = None

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Its strides; packed sequences lie one after the other, not a stride apart."""
        return x.stride() if self.ends_q is None else (0, *x.stride()[1:])

    def key(self, q: Tensor, v: Tensor) -> str:
        """What the choice of tiles depends on."""
        heads = size(self.batch * q.shape[1])
        sides = "".join("-" if side < 0 else "|" for side in (self.left, self.right))
        packed = "" if self.ends_q is None else " packed"
        return (
            f"{q.dtype} {self.precision} d={q.shape[3]} dv={v.shape[3]} t{size(self.t)} s{size(self.s)} heads{heads} "
            f"sides={sides}{packed}"
        )

    def what(self, q: Tensor, v: Tensor) -> dict[str, Any]:
        """The arguments that the kernels have in common."""
        # a window of more than there is, is none that can overflow
        left, right = (min(side, self.t + self.s) for side in (self.left, self.right))
        return {
            "t": self.t, "s": self.s, "unit": self.scale * LOG2E, "left": left, "right": right, "LEFT": left >= 0,
            "RIGHT": right >= 0, **sizes(q.shape[3], v.shape[3]), "PRECISION": self.precision,
        }  # fmt: skip


def sizes(d: int, dv: int) -> dict[str, int]:
    """Of a head, and of the tiles that hold one: powers of 2, and what tensor cores take at least."""
    return {"D": d, "DV": dv, "BLOCK_D": max(16, next_power_of_2(d)), "BLOCK_DV": max(16, next_power_of_2(dv))}


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
    """O into `out`, each row of it contiguous, and L, in units of log 2, into `lse`, a head of it contiguous."""
    heads = q.shape[1]
    if not q.numel() or not call.t:
        return

    def launch(one: Config) -> None:
        blocks = triton.cdiv(call.t, one["BLOCK_M"])
        forward_kernel[(blocks * heads * call.batch,)](
            q, *_given((k, v), one, "BLOCK_N"), out, lse, call.ends_q, call.ends_k,
            *call.strides(q), *call.strides(k), *call.strides(v), *call.strides(out)[:3], *call.strides(lse)[:2],
            heads=heads, group=heads // k.shape[1], blocks=blocks, **call.what(q, v), **one.options(),
        )  # fmt: skip

    with at(q.device):
        launch(_tuned("forward", (k, v), q, v, call, launch))


def _describable(tensors: tuple[Tensor, ...], call: Call) -> bool:
    """Whether descriptors can say where tiles of these lie: in whole 16 bytes, and not packed.

    Of packed sequences, a descriptor would fill up the last tile of one with the next one's values, and 0 · NaN is NaN.
    """
    return call.ends_q is None and all(
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(n > 0 and n * x.element_size() % 16 == 0 for n in x.stride()[:3])
        for x in tensors
    )


def _given(tensors: tuple[Tensor, ...], one: Config, rows: str) -> tuple[Any, ...]:
    """The tensors, or by TMA their descriptors, for tiles of so many rows."""
    if not one.options().get("TMA"):
        return tensors
    blocks = [[1, 1, one[rows], max(16, next_power_of_2(x.shape[3]))] for x in tensors]
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x, block in zip(tensors, blocks, strict=True)
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    call: Call,
) -> None:
    """dQ, dK and dV into `grads`, whose rows are contiguous."""
    dq, dk, dv = grads
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)
    heads, kv_heads = q.shape[1], k.shape[1]
    common = call.what(q, v)
    rows_of_inputs = *call.strides(q), *call.strides(k), *call.strides(v), *call.strides(grad)

    def sums() -> None:
        blocks = triton.cdiv(call.t, SUMS["BLOCK_M"])
        backward_kernels.row_sums[(blocks * heads * call.batch,)](
            out, grad, grad_lse, delta, call.ends_q, *call.strides(out)[:3], *call.strides(grad),
            *((0, 0, 0) if grad_lse is None else call.strides(grad_lse)), *call.strides(delta)[:2],
            call.t, heads, blocks, DV=common["DV"], BLOCK_DV=common["BLOCK_DV"], **SUMS.options(),
        )  # fmt: skip

    def of_keys(one: Config) -> None:
        blocks = triton.cdiv(call.s, one["BLOCK_N"])
        backward_kernels.grad_kv[(blocks * kv_heads * call.batch,)](
            *_given((q,), one, "BLOCK_M"), k, v, *_given((grad,), one, "BLOCK_M"), lse, delta, dk, dv,
            call.ends_q, call.ends_k, *rows_of_inputs,
            *call.strides(dk)[:3], *call.strides(dv)[:3], *call.strides(lse)[:2],
            heads=kv_heads, group=heads // kv_heads, blocks=blocks, **common, **one.options(),
        )  # fmt: skip

    def of_queries(one: Config) -> None:
        blocks = triton.cdiv(call.t, one["BLOCK_M"])
        backward_kernels.grad_q[(blocks * heads * call.batch,)](
            q, *_given((k, v), one, "BLOCK_N"), grad, lse, delta, dq, call.ends_q, call.ends_k, *rows_of_inputs,
            *call.strides(dq)[:3], *call.strides(lse)[:2],
            heads=heads, group=heads // kv_heads, blocks=blocks, **common, **one.options(),
        )  # fmt: skip

    with at(q.device):
        if q.numel() and call.t:
            sums()
            of_queries(_tuned("queries", (k, v), q, v, call, of_queries))
        if k.numel() and call.s:
            of_keys(_tuned("keys", (q, grad), q, v, call, of_keys))


def _tuned(kernel: str, read: tuple[Tensor, ...], q: Tensor, v: Tensor, call: Call, launch: Any) -> Config:
    """The config for a kernel that reads tiles of these tensors in its loop."""
    described, device = _describable(read, call), q.device
    forced: Config | None = getattr(call.configs, kernel)
    if forced is not None and forced.options().get("TMA") and not described:
        raise ValueError(
            f"config must have no TMA for the kernel {kernel!r} here, got {forced}: descriptors are of tensors "
            "whose rows are contiguous, begin at multiples of 16 bytes, and are not packed"
        )
    described = described and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    tried = configs(kernel, q.dtype, max(q.shape[3], v.shape[3]), described)
    key = call.key(q, v) + (" described" if described else "")
    return tuned(f"flash.{kernel}", key, tried, launch, device, forced)


# --- tiles ------------------------------------------------------------------------------------------------------------

# Why some spill, measured with Triton 3.9's compiler. In 16 bits, the config after each spills none, and does less for
# each load.
WINDOW = "with a window, 32 bytes on sm_80; none on sm_90"
KEYS_128 = "on sm_80 16 bytes, with a window 48; none on sm_90"
KEYS_256 = "none on sm_80; on sm_90 240 bytes, by TMA 296: sums of 64 keys, wgmma's fewest, take half the registers"
QUERIES_128 = "on sm_80 32 bytes, packed 48; none on sm_90"
TF32 = "in TF32 on sm_80, 8 bytes; none in float32, where half as many keys spill 16"


def _tiles(*of: tuple[int, int, int, int], why_spills: str = "", tma: bool = False) -> tuple[Config, ...]:
    more = {"TMA": 1} if tma else {}
    return tuple(
        config(BLOCK_M=m, BLOCK_N=n, **more, warps=warps, stages=stages, why_spills=why_spills)
        for m, n, warps, stages in of
    )


# By the larger of d and dv, up to 64, 128 and 256
IN_16_BITS = {
    "forward": {
        64: _tiles((128, 64, 8, 3), (64, 64, 4, 3)),
        128: _tiles((128, 64, 8, 3), why_spills=WINDOW) + _tiles((64, 64, 8, 3)),
        256: _tiles((64, 64, 8, 2), (64, 32, 8, 2)),
    },
    "keys": {
        64: _tiles((64, 128, 8, 2), (32, 128, 8, 2)),
        128: _tiles((32, 128, 8, 2), why_spills=KEYS_128) + _tiles((32, 64, 8, 2)),
        256: _tiles((32, 64, 8, 2), why_spills=KEYS_256) + _tiles((32, 32, 8, 2)),
    },
    "queries": {
        64: _tiles((128, 64, 8, 2), (128, 32, 4, 2)),
        128: _tiles((128, 64, 8, 2), why_spills=QUERIES_128) + _tiles((128, 32, 8, 2)),
        256: _tiles((64, 32, 8, 2)),
    },
}
BY_TMA = {
    "forward": {
        64: _tiles((128, 128, 8, 3), (128, 64, 8, 3), tma=True),
        128: _tiles((128, 128, 8, 2), (128, 64, 8, 3), tma=True),
        256: _tiles((128, 64, 8, 2), tma=True),
    },
    "keys": {
        64: _tiles((64, 128, 8, 2), tma=True),
        128: _tiles((32, 128, 8, 2), (64, 128, 8, 1), tma=True),
        256: _tiles((32, 64, 8, 2), why_spills=KEYS_256, tma=True) + _tiles((64, 32, 8, 2), tma=True),
    },
    "queries": {
        64: _tiles((128, 64, 8, 2), tma=True),
        128: _tiles((128, 64, 8, 2), tma=True),
        256: _tiles((64, 32, 8, 2), tma=True),
    },
}
# Without tensor cores a thread keeps whole rows of both factors in registers: small tiles
IN_FLOAT32 = {
    "forward": {64: _tiles((32, 32, 4, 1)), 128: _tiles((16, 16, 4, 1))},
    "keys": {64: _tiles((32, 32, 8, 1)), 128: _tiles((16, 32, 8, 1))},
    "queries": {64: _tiles((32, 32, 8, 1), why_spills=TF32), 128: _tiles((16, 16, 8, 1))},
}


def configs(kernel: str, dtype: torch.dtype, widest: int, described: bool) -> tuple[Config, ...]:
    """What may be tried for a kernel; by TMA too, if the tensors can be described."""
    if dtype == torch.float32:
        return IN_FLOAT32[kernel][64 if widest <= 64 else 128]
    width = 64 if widest <= 64 else 128 if widest <= 128 else 256
    return (BY_TMA[kernel][width] if described else ()) + IN_16_BITS[kernel][width]


# --- what the compiler is shown ---------------------------------------------------------------------------------------


def specimens() -> list[Specimen]:
    """The kernels with every config, causal; and once each packed with a window, and with TF32."""
    found = []
    for kernel in KERNELS:
        for dtype, widths in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128))):
            found += [_specimen(kernel, dtype, d, one) for d in widths for one in configs(kernel, dtype, d, True)]
        first = IN_16_BITS[kernel][128][0]
        found.append(_specimen(kernel, torch.bfloat16, 128, first, window=True, packed=True))
        found.append(_specimen(kernel, torch.float32, 64, IN_FLOAT32[kernel][64][0], precision="tf32"))
    return found + [_specimen("row_sums", torch.bfloat16, d, SUMS) for d in (64, 128)]


def _specimen(
    name: str,
    dtype: torch.dtype,
    d: int,
    one: Config,
    *,
    window: bool = False,
    packed: bool = False,
    precision: str = "ieee",
) -> Specimen:
    """Of contiguous tensors, all of one size of head."""
    kernel = KERNELS.get(name, backward_kernels.row_sums)
    stored = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), f"*{stored}")
    types |= dict.fromkeys(("lse", "delta", "grad_lse"), "*fp32") | dict.fromkeys(("ends_q", "ends_k"), "*i32")
    constants: dict[str, Any] = {"LEFT": window, "RIGHT": True, **sizes(d, d), "PRECISION": precision, "TMA": 0}
    constants |= {"q_d": 1, "k_d": 1, "v_d": 1, "g_d": 1, "gl_t": 1}
    constants |= {} if packed else {"ends_q": None, "ends_k": None}
    aligned = {x for x in kernel.arg_names if x[-2:] in ("_b", "_h", "_t", "_s") and x[0] != "l" and x[:2] != "gl"}
    aligned |= types.keys()
    by_tma = bool(one.options().get("TMA"))
    if by_tma:
        described, tile = (("q", "grad"), "BLOCK_M") if name == "keys" else (("k", "v"), "BLOCK_N")
        types |= dict.fromkeys(described, f"tensordesc<{stored}[1,1,{one[tile]},{d}]>")
        aligned -= set(described)
    kind = " window" * window + " packed" * packed + " tf32" * (precision == "tf32")
    rows = one.options().get("BLOCK_N" if name == "keys" else "BLOCK_M", 0)
    hopper = "wgmma" if rows >= 64 else "mma.sync", "TMA" if by_tma else "cp.async"  # wgmma takes 64 rows at least
    fast = dtype != torch.float32 and name != "row_sums"
    return Specimen(
        name=f"flash.{name} {str(dtype).removeprefix('torch.')} d={d}{kind}",
        kernel=kernel,
        signature={x: types.get(x, "fp32" if x == "unit" else "i32") for x in kernel.arg_names},
        config=one,
        constants={x: value for x, value in constants.items() if x in kernel.arg_names},
        aligned=tuple(x for x in kernel.arg_names if x in aligned and x not in constants),
        shows={80: ("mma.sync",), 90: hopper} if fast else {},
        targets=(90,) if by_tma else (),
    )


KERNELS = {"forward": forward_kernel, "keys": backward_kernels.grad_kv, "queries": backward_kernels.grad_q}
