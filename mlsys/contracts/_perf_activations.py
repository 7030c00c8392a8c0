"""An exercise about memory: what one block of a GPT keeps for its backward pass."""

from __future__ import annotations

import random
from math import prod

from mlsys.contracts._perf_formula import Formula, wrong
from mlsys.contracts.core import Case
from mlsys.perf import activations
from mlsys.perf.configs import gpt
from mlsys.perf.transformer import Recompute

# Of one block with dropout, in 16 bits: bytes an element, its shape as a string of axes, and who divides it.
# b batch, s sequence, h width, H hidden width of the MLP, a heads
KEPT = (
    (2, "bsh", "sequence"),  # input of the attention's norm
    (2, "bsh", "sequence"),  # what queries, keys and values are made from
    (2, "bsh", "tensor"),  # queries
    (2, "bsh", "tensor"),  # keys
    (2, "bsh", "tensor"),  # values
    (2, "bass", "core"),  # softmax of the scores
    (1, "bass", "core"),  # mask of its dropout
    (2, "bass", "core"),  # what the dropout left
    (2, "bsh", "tensor"),  # input of the output projection
    (1, "bsh", "sequence"),  # mask of the dropout after it
    (2, "bsh", "sequence"),  # input of the MLP's norm
    (2, "bsh", "sequence"),  # input of its first matrix
    (2, "bsH", "tensor"),  # input of GELU
    (2, "bsH", "tensor"),  # input of its second matrix
    (1, "bsh", "sequence"),  # mask of the dropout after it
)


def _block(batch: int, seq: int, d_model: int, heads: int, tp: int, sequence_parallel: bool, recompute: str) -> int:
    config = gpt(1, d_model, heads, vocab=tp, context=seq)
    kept: Recompute = recompute  # type: ignore[assignment]
    return activations.activation_bytes_per_layer(
        config, batch, seq, recompute=kept, tp=tp, sequence_parallel=sequence_parallel
    )


def _block_oracle(
    batch: int, seq: int, d_model: int, heads: int, tp: int, sequence_parallel: bool, recompute: str
) -> tuple[float]:
    """Tensor by tensor: its elements, those of them on device 0, and their bytes."""
    axes = {"b": batch, "s": seq, "h": d_model, "H": 4 * d_model, "a": heads}
    total = 0
    for index, (size, shape, kind) in enumerate(KEPT):
        if (recompute == "selective" and kind == "core") or (recompute == "full" and index > 0):
            continue
        divided = kind != "sequence" or sequence_parallel
        total += size * prod(axes[axis] for axis in shape) // (tp if divided else 1)
    return (float(total),)


def _block_plain(
    batch: int,
    seq: int,
    d_model: int,
    heads: int,
    tp: int,
    sequence_parallel: bool,
    recompute: str,
    *,
    norms: float = 10,
    inside: float = 24,
    core: float = 5,
    own_scores: bool = True,
    quadratic: bool = True,
    divide_sequence: bool = True,
    always_divide: bool = False,
    divide_core: bool = True,
    selective: bool = True,
    full: float = 2,
    unit: float = 1,
) -> float:
    shared = tp if (sequence_parallel and divide_sequence) or always_divide else 1
    sbh = seq * batch * d_model
    if recompute == "full":
        return full * sbh / shared / unit
    total = sbh * (norms / shared + inside / tp)
    if recompute == "none" or not selective:
        scores = batch * seq * (seq if quadratic else 1) * (heads if own_scores else 1)
        total += core * scores / (tp if divide_core else 1)
    return total / unit


def _draw(rng: random.Random) -> Case:
    tp = rng.choice((1, 2, 4, 8))
    heads = tp * rng.randint(1, 12)
    return {
        "batch": rng.randint(1, 8),
        "seq": tp * rng.randint(1, 512),
        "d_model": heads * rng.choice((16, 64, 128)),
        "heads": heads,
        "tp": tp,
        "sequence_parallel": tp > 1 and rng.random() < 0.5,
        "recompute": rng.choice(("none", "selective", "full")),
    }


def _case(
    seq: int, d_model: int, heads: int, tp: int = 1, sp: bool = False, recompute: str = "none", b: int = 1
) -> Case:
    sizes = {"batch": b, "seq": seq, "d_model": d_model, "heads": heads, "tp": tp}
    return sizes | {"sequence_parallel": sp, "recompute": recompute}


ACTIVATIONS = Formula(
    signature="block_bytes(batch, seq, d_model, heads, tp, sequence_parallel, recompute) -> bytes of a device",
    results=("bytes",),
    reference=_block,
    oracle=_block_oracle,
    draw=_draw,
    cases=[
        _case(1, 8, 1),
        _case(16, 8, 2),
        _case(32, 64, 4, b=3),
        _case(32, 64, 4, recompute="selective"),
        _case(32, 64, 4, recompute="full"),
        _case(32, 64, 4, tp=4),
        _case(32, 64, 4, tp=4, sp=True),
        _case(32, 64, 4, tp=2, recompute="selective"),
        _case(32, 64, 4, tp=2, sp=True, recompute="selective"),
        _case(32, 64, 4, tp=2, sp=True, recompute="full"),
        _case(2048, 12288, 96, tp=8, sp=True, recompute="selective"),  # GPT-3: 34/8 · s·b·h
        _case(2048, 12288, 96, tp=8),
    ],
    wrong={
        "masks_in_16_bits": wrong(_block_plain, "a dropout mask takes one byte an element", norms=12, core=6),
        "dropout_forgotten": wrong(
            _block_plain, "dropout keeps masks, and after the softmax its result", norms=8, core=2
        ),
        "only_the_softmax": wrong(
            _block_plain, "between the two products of attention also the dropout's mask and result are kept", core=2
        ),
        "scores_of_one_head": wrong(_block_plain, "every head has scores of its own", own_scores=False),
        "scores_linear": wrong(
            _block_plain, "each of the s queries has a score for each of the s keys", quadratic=False
        ),
        "narrow_mlp": wrong(_block_plain, "the hidden layer is four times as wide as the model", inside=12),
        "gelu_input_forgotten": wrong(_block_plain, "GELU keeps its input, and the second matrix its own", inside=16),
        "qkv_forgotten": wrong(_block_plain, "queries, keys and values are kept, 2 bytes an element each", inside=18),
        "projection_input_forgotten": wrong(_block_plain, "the output projection keeps its input", inside=22),
        "norm_inputs_forgotten": wrong(_block_plain, "both norms keep their inputs", norms=6),
        "sequence_never_divided": wrong(
            _block_plain,
            "with sequence parallelism, norms' inputs and dropout masks are divided too",
            divide_sequence=False,
        ),
        "everything_divided": wrong(
            _block_plain,
            "without sequence parallelism every device holds norms' inputs and masks whole",
            always_divide=True,
        ),
        "core_never_divided": wrong(_block_plain, "a device has the scores of its own heads only", divide_core=False),
        "selective_keeps_all": wrong(
            _block_plain, "selective recomputation drops what lies between attention's two products", selective=False
        ),
        "full_keeps_nothing": wrong(_block_plain, "full recomputation still keeps the input of the block", full=0),
        "full_keeps_both_norms": wrong(
            _block_plain, "full recomputation keeps the input of the block, and no more", full=4
        ),
        "elements": wrong(
            _block_plain, "return bytes: two an element, one in a mask", norms=6, inside=12, core=3, full=1
        ),
        "mebibytes": wrong(_block_plain, "return bytes, not MiB", unit=2**20),
    },
)
