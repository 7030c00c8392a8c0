"""Published numbers about time and traffic: days of training, pipelines' bubbles, bytes sent, speculative decoding."""

from __future__ import annotations

from itertools import product
from math import prod

from mlsys.claims._parallel_memory import megatron
from mlsys.claims.core import Claim
from mlsys.perf import collectives, pipeline, tensor_parallel, transformer

MEGATRON = "Narayanan et al. 2021, arXiv:2104.04473"
ZERO_BUBBLE = "Qi et al. 2024, arXiv:2401.10241"
POWER_SGD = "Vogels et al. 2019, arXiv:1905.13727, Table 3"
LEVIATHAN = "Leviathan et al. 2023, arXiv:2211.17192, Table 1"
NCCL_TESTS = "NVIDIA nccl-tests, PERFORMANCE.md, AllReduce"

TRAINING = [
    Claim(
        name=f"megatron-{published:g}b",
        area="perf.transformer",
        source=f"{MEGATRON}, Table 1",
        what=f"parameters with {layers} layers, {d_model} wide",
        unit="B",
        published=published,
        digits=1,
        compute=lambda layers=layers, d_model=d_model, heads=heads: (  # type: ignore[misc]
            transformer.parameters(megatron(layers, d_model, heads)).total / 1e9
        ),
    )
    for layers, d_model, heads, published in (
        (24, 2304, 24, 1.7),
        (40, 6144, 48, 18.4),
        (80, 12288, 96, 145.6),
        (128, 25600, 160, 1008.0),
    )
] + [
    Claim(
        name="megatron-days-175b",
        area="perf.transformer",
        source=f"{MEGATRON}, section 5.1",
        what="days to train 175 B parameters on 300 B tokens with 1,024 A100 at 140 TFLOP/s each",
        unit="days",
        published=34,
        digits=0,
        compute=lambda: transformer.megatron_training_days(175e9, 300e9, 1024, 140e12),
    ),
    Claim(
        name="megatron-days-1t",
        area="perf.transformer",
        source=f"{MEGATRON}, section 5.1",
        what="days to train 1 T parameters on 450 B tokens with 3,072 A100 at 163 TFLOP/s each",
        unit="days",
        published=84,
        digits=0,
        compute=lambda: transformer.megatron_training_days(1e12, 450e9, 3072, 163e12),
        tolerance=0.02,
        expected="approximate",
        reason="163 TFLOP/s is printed without digits after the point, 1008 B parameters as 1 T",
    ),
]

PIPELINES = [
    Claim(
        name="zb-h1-bubble",
        area="perf.pipeline",
        source=f"{ZERO_BUBBLE}, section 2.3 and Table 2 with equal F, B and W",
        what="bubble of ZB-H1 over the bubble of 1F1B at the same memory, 8 stages",
        unit="",
        published=0.33,
        digits=2,
        formula=True,
        compute=lambda: pipeline.bubble("zb-h1", 8, 32).seconds / pipeline.bubble("1f1b", 8, 32).seconds,
    ),
    Claim(
        name="interleaved-bubble",
        area="perf.pipeline",
        source=f"{MEGATRON}, section 2.2.2",
        what="bubble of four interleaved chunks a device over the bubble of one, 8 stages, 32 microbatches",
        unit="",
        published=0.25,
        digits=2,
        formula=True,
        compute=lambda: (
            pipeline.bubble("interleaved", 8, 32, chunks=4).seconds / pipeline.bubble("1f1b", 8, 32).seconds
        ),
    ),
    Claim(
        name="gpipe-bubble",
        area="perf.pipeline",
        source="Huang et al. 2019, arXiv:1811.06965, section 2.3, (K−1)/(M+K−1) at K = 8, M = 4K",
        what="idle share of GPipe with 8 stages and 32 microbatches",
        unit="",
        published=0.1795,
        digits=4,
        formula=True,
        compute=lambda: pipeline.bubble("gpipe", 8, 32).over_total,
    ),
    Claim(
        name="ring-all-reduce-bytes",
        area="perf.collectives",
        source=f"{NCCL_TESTS}, factor 2(n−1)/n at n = 8",
        what="bytes that a rank sends in a ring all-reduce over the bytes of the vector, 8 ranks",
        unit="",
        published=1.75,
        digits=2,
        formula=True,
        compute=lambda: collectives.cost("all_reduce", "ring", 8, 2**20).bytes_per_rank / 2**20,
    ),
    Claim(
        name="ring-all-reduce-steps",
        area="perf.collectives",
        source="Sergeev & Del Balso 2018, arXiv:1802.05799, section 3",
        what="messages that each of 16 ranks sends in a ring all-reduce, 2(N−1)",
        unit="",
        published=30,
        digits=0,
        formula=True,
        compute=lambda: collectives.cost("all_reduce", "ring", 16, 2**20).steps,
    ),
    Claim(
        name="tensor-parallel-volume",
        area="perf.tensor_parallel",
        source=f"{MEGATRON}, section 3.2, 8bsh(t−1)/t at b = 1, s = 2048, h = 12288, t = 8",
        what="numbers that a device sends for a layer and a microbatch, in multiples of s·h",
        unit="",
        published=7,
        digits=0,
        formula=True,
        compute=lambda: tensor_parallel.elements_per_layer(1, 2048, 12288, 8) / (2048 * 12288),
    ),
]


def resnet18_shapes() -> tuple[list[tuple[int, int]], int]:
    """ResNet-18 for 32 × 32 images: its matrices as (out, in · kernel area), and how many numbers are in vectors."""
    matrices, vectors = [(64, 3 * 9)], 2 * 64
    width_in = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block in range(2):
            first = width_in if block == 0 else width
            matrices += [(width, first * 9), (width, width * 9)]
            vectors += 4 * width
            if block == 0 and (stride != 1 or first != width):
                matrices.append((width, first))
                vectors += 2 * width
        width_in = width
    return [*matrices, (10, 512)], vectors + 10


def power_sgd_ratio(rank: int) -> float:
    """Numbers of the gradient over numbers sent: two thin factors for each matrix, vectors as they are."""
    matrices, vectors = resnet18_shapes()
    sent = sum(min(rank * (rows + columns), rows * columns) for rows, columns in matrices) + vectors
    return (sum(prod(shape) for shape in matrices) + vectors) / sent


COMPRESSION = [
    Claim(
        name=f"power-sgd-rank-{rank}",
        area="perf.collectives",
        source=POWER_SGD,
        what=f"compression of the gradients of ResNet-18 by PowerSGD of rank {rank}",
        unit="×",
        published=published,
        digits=0,
        compute=lambda rank=rank: power_sgd_ratio(rank),  # type: ignore[misc]
    )
    for rank, published in ((1, 243), (2, 136), (4, 72))
]


def speculative_tokens(alpha: float, gamma: int) -> float:
    """Expected tokens of one verification: every pattern of accepted and rejected drafts, weighted and counted."""
    expected = 0.0
    for accepted in product((True, False), repeat=gamma):
        probability = prod(alpha if yes else 1 - alpha for yes in accepted)
        kept = accepted.index(False) if False in accepted else gamma
        expected += probability * (kept + 1)  # the target model adds a token of its own
    return expected


def speculative_operations(alpha: float, gamma: int) -> float:
    """Target-model operations for each token against plain decoding, the draft model's cost left out."""
    return (gamma + 1) / speculative_tokens(alpha, gamma)


SPECULATION = [
    claim
    for alpha, gamma, operations, speed in ((0.6, 2, 1.53, 1.96), (0.8, 5, 1.63, 3.69), (0.9, 10, 1.60, 6.86))
    for claim in (
        Claim(
            name=f"speculative-speed-{alpha}-{gamma}",
            area="perf.inference",
            source=LEVIATHAN,
            what=f"tokens of one verification, {gamma} drafts, each accepted with probability {alpha}",
            unit="",
            published=speed,
            digits=2,
            compute=lambda alpha=alpha, gamma=gamma: speculative_tokens(alpha, gamma),  # type: ignore[misc]
        ),
        Claim(
            name=f"speculative-operations-{alpha}-{gamma}",
            area="perf.inference",
            source=LEVIATHAN,
            what="operations of the large model for each token, against plain decoding",
            unit="×",
            published=operations,
            digits=2,
            compute=lambda alpha=alpha, gamma=gamma: speculative_operations(alpha, gamma),  # type: ignore[misc]
        ),
    )
]
