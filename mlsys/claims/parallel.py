"""Published numbers about training on many devices: ZeRO, activations, pipelines, all-reduce, gradient compression."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod
from typing import Any

from mlsys.claims.core import Claim
from mlsys.perf import activations, checkpointing, collectives, pipeline, tensor_parallel, transformer, zero
from mlsys.perf.configs import Config, gpt

ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198"
MEGATRON = "Narayanan et al. 2021, arXiv:2104.04473"
ZERO_BUBBLE = "Qi et al. 2024, arXiv:2401.10241"
POWER_SGD = "Vogels et al. 2019, arXiv:1905.13727, Table 3"
LEVIATHAN = "Leviathan et al. 2023, arXiv:2211.17192, Table 1"
REVOLVE = "Griewank & Walther 2000, doi:10.1145/347837.347846, equation for t(l, s)"
NCCL_TESTS = "NVIDIA nccl-tests, PERFORMANCE.md, AllReduce"
PATARASUK = "Patarasuk & Yuan 2009, JPDC 69(2), lower bound 2(N−1)/N of the vector for each node"

SEVEN_B, TRILLION = 7.5e9, 1e12


def zero_gb(parameters: float, n: int, stage: int) -> float:
    """Model state of one of n devices, GB; 16-bit weights and gradients, 12 bytes a parameter for Adam."""
    return zero.memory(parameters, n, stage).total / 1e9


def megatron(layers: int, d_model: int, heads: int) -> Config:
    """A model of Megatron's scaling study: vocabulary padded to 51,200, 2,048 positions."""
    return gpt(layers, d_model, heads, vocab=51_200, context=2048)


MT_NLG = megatron(105, 20480, 128)
GPT_3 = megatron(96, 12288, 96)


def layer_units(config: Config, **settings: object) -> float:
    """Activation bytes of one layer at batch 1 in units of s·b·h: the column of the paper's Table 2."""
    size = activations.activation_bytes_per_layer(config, 1, config.context, **settings)  # type: ignore[arg-type]
    return size / (config.context * config.d_model)


def selective_saving(config: Config) -> float:
    """How much of a layer's activations selective recomputation does not keep, in percent; no parallelism."""
    return 100 * (1 - layer_units(config, recompute="selective") / layer_units(config))


def selective_overhead(config: Config) -> float:
    """The FLOPs of the recomputed attention core over those of a forward pass through the layers, in percent."""
    flops = transformer.forward_flops(config, 1, config.context)
    return 100 * flops.attention_scores / (flops.total - flops.logits)


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


ZERO_MEMORY = [
    Claim(
        name=f"zero-{n}-stage-{stage}" if parameters == SEVEN_B else f"zero-trillion-{n}",
        area="perf.zero",
        source=f"{ZERO}, {where}",
        what=f"model state of a device, {parameters / 1e9:g} B parameters, {n} devices, stage {stage}",
        unit="GB",
        published=published,
        digits=digits,
        compute=lambda parameters=parameters, n=n, stage=stage: zero_gb(parameters, n, stage),  # type: ignore[misc]
    )
    for parameters, n, stage, published, digits, where in (
        (SEVEN_B, 64, 0, 120, 0, "Figure 1"),
        (SEVEN_B, 64, 1, 31.4, 1, "Figure 1"),
        (SEVEN_B, 64, 2, 16.6, 1, "Figure 1"),
        (SEVEN_B, 64, 3, 1.9, 1, "Figure 1"),
        (SEVEN_B, 4, 1, 52.5, 1, "Table 1"),
        (SEVEN_B, 16, 2, 21.6, 1, "Table 1"),
        (SEVEN_B, 1024, 3, 0.12, 2, "Table 1"),
        (TRILLION, 1024, 3, 15.6, 1, "Table 1"),
    )
] + [
    Claim(
        name="zero-3-communication",
        area="perf.zero",
        source=f"{ZERO}, section 7.2.2",
        what="bytes sent with stage 3 over those of plain data parallelism",
        unit="×",
        published=1.5,
        digits=1,
        compute=lambda: zero.communication(SEVEN_B, 64, 3) / zero.communication(SEVEN_B, 64, 0),
    ),
]

ACTIVATIONS = (
    [
        Claim(
            name=f"activations-{name}",
            area="perf.activations",
            source=f"{KORTHIKANTI}, Table 2 with 5as/h = 80 and t = 8",
            what=f"activation memory of a layer of GPT-3, {what}",
            unit="s·b·h bytes",
            published=published,
            digits=2,
            formula=True,
            compute=lambda settings=settings: layer_units(GPT_3, **settings),  # type: ignore[misc]
        )
        for name, what, published, settings in (
            ("none", "no parallelism", 34 + 80, {}),
            ("tp", "tensor parallel", 10 + (24 + 80) / 8, {"tp": 8}),
            ("tp-sp", "tensor and sequence parallel", (34 + 80) / 8, {"tp": 8, "sequence_parallel": True}),
            (
                "tp-selective",
                "tensor parallel, selective recomputation",
                10 + 24 / 8,
                {"tp": 8, "recompute": "selective"},
            ),
            (
                "tp-sp-selective",
                "tensor and sequence parallel, selective recomputation",
                34 / 8,
                {"tp": 8, "sequence_parallel": True, "recompute": "selective"},
            ),
            ("full", "full recomputation", 2, {"recompute": "full"}),
        )
    ]
    + [
        Claim(
            name=f"selective-saving-{name}",
            area="perf.activations",
            source=f"{KORTHIKANTI}, section 5",
            what=f"activation memory that selective recomputation saves, {label}",
            unit="%",
            published=saving,
            digits=0,
            compute=lambda config=config: selective_saving(config),  # type: ignore[misc]
        )
        for name, label, config, saving in (("gpt3", "GPT-3", GPT_3, 70), ("mt-nlg", "MT-NLG 530B", MT_NLG, 65))
    ]
    + [
        Claim(
            name=f"selective-overhead-{name}",
            area="perf.transformer",
            source=f"{KORTHIKANTI}, section 5",
            what=f"FLOPs that it recomputes, in percent of the forward pass, {label}",
            unit="%",
            published=overhead,
            digits=1,
            compute=lambda config=config: selective_overhead(config),  # type: ignore[misc]
        )
        for name, label, config, overhead in (("gpt3", "GPT-3", GPT_3, 2.7), ("mt-nlg", "MT-NLG 530B", MT_NLG, 1.6))
    ]
)

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

RECOMPUTATION = [
    Claim(
        name=f"revolve-{steps}-{snapshots}",
        area="perf.checkpointing",
        source=REVOLVE,
        what=f"forward steps repeated by the best schedule of {steps} steps with {snapshots} snapshots: "
        "theirs closed form, ours counted by running the schedule",
        unit="",
        published=published,
        digits=0,
        formula=True,
        compute=lambda steps=steps, snapshots=snapshots: checkpointing.replay(  # type: ignore[misc]
            checkpointing.revolve_schedule(steps, snapshots), steps, snapshots
        ),
    )
    for steps, snapshots, published in ((20, 3, 45), (100, 5, 316), (100, 10, 222))
]

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


# --- counted on ranks that run ----------------------------------------------------------------------------------------

RANKS = 4


@cache
def counted() -> dict[str, float]:
    """What four processes of this library send and hold, the largest of the four: bytes counted, not computed."""
    from mlsys.parallel.launcher import launch

    found = launch(_count, RANKS)
    return {name: max(one[name] for one in found) for name in found[0]}


def _count() -> dict[str, float]:
    """Runs in each rank."""
    return {**_count_all_reduce(), **_count_steps(), **_count_compressed()}


def _count_all_reduce() -> dict[str, float]:
    """Bytes sent over bytes of the vector."""
    import torch

    from mlsys.parallel.collectives import all_reduce
    from mlsys.parallel.traffic import ledger

    found = {}
    for algorithm in ("ring", "halving_doubling", "recursive_doubling"):
        vector = torch.ones(4096)
        with ledger() as book:
            all_reduce(vector, algorithm=algorithm, check=False)
        found[algorithm] = book.bytes["all_reduce"] / (vector.numel() * vector.element_size())
    return found


def _count_steps() -> dict[str, float]:
    """Of data parallelism and the ZeRO stages: bytes sent in a step, and bytes held, for each parameter.

    The model is in bfloat16, with masters and Adam's moments in float32. Held is counted at the end of backward, when
    there is most of it.
    """
    import torch
    from torch import nn

    from mlsys.parallel.data_parallel import DataParallel
    from mlsys.parallel.traffic import ledger
    from mlsys.parallel.zero import ZeRO1, ZeRO2
    from mlsys.parallel.zero3 import ZeRO3

    found = {}
    for name, wrap in {
        "DataParallel": lambda module: DataParallel(module.bfloat16()),
        "ZeRO1": lambda module: ZeRO1(module, dtype=torch.bfloat16),
        "ZeRO2": lambda module: ZeRO2(module, dtype=torch.bfloat16),
        "ZeRO3": lambda module: ZeRO3(module, dtype=torch.bfloat16, units=lambda part: isinstance(part, nn.Linear)),
    }.items():
        module = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
        numbers = sum(p.numel() for p in module.parameters())
        model: Any = wrap(module)
        zero = not isinstance(model, DataParallel)
        optimizer = model.optimizer(torch.optim.Adam) if zero else torch.optim.Adam(module.parameters())
        batch = torch.ones(2, 128, dtype=torch.bfloat16)
        for _ in range(2):  # in the first step there are no moments yet
            with ledger() as book:
                model(batch).sum().backward()
                if zero:
                    found[f"{name} holds"] = model.memory().total / numbers
                optimizer.step()
                optimizer.zero_grad()
        found[f"{name} sends"] = book.sent / numbers
        model.close()
    return found


def _count_compressed() -> dict[str, float]:
    """The gradients of ResNet-18, as data parallelism sends them plain and by PowerSGD: the ratio of the bytes."""
    import torch
    from torch import nn

    from mlsys.parallel.compress import PowerSGD
    from mlsys.parallel.data_parallel import DataParallel
    from mlsys.parallel.traffic import ledger

    matrices, vectors = resnet18_shapes()
    sent = {}
    for rank in (0, 1, 2, 4):
        module = nn.ParameterList([torch.ones(shape) for shape in (*matrices, (vectors,))])
        model = DataParallel(module, compress=PowerSGD(rank) if rank else None, algorithm="backend")
        with ledger() as book:
            torch.stack([parameter.sum() for parameter in module]).sum().backward()
        sent[rank] = book.sent
        model.close()
    return {f"PowerSGD {rank}": sent[0] / sent[rank] for rank in (1, 2, 4)}


COUNTED = (
    [
        Claim(
            name=f"counted-{algorithm.replace('_', '-')}-bytes",
            area="parallel.collectives",
            source=source,
            what=f"bytes that a rank sends over the bytes of the vector, all-reduce by {words}, {RANKS} ranks, counted",
            unit="",
            published=published,
            digits=2,
            formula=True,
            compute=lambda algorithm=algorithm: counted()[algorithm],  # type: ignore[misc]
        )
        for algorithm, words, published, source in (
            ("ring", "a ring", 1.5, f"{PATARASUK}, at N = 4"),
            ("halving_doubling", "halving and doubling", 1.5, f"{PATARASUK}, at N = 4"),
            (
                "recursive_doubling",
                "recursive doubling",
                2.0,
                "Thakur, Rabenseifner & Gropp 2005, IJHPCA 19(1), recursive doubling, n·log₂ p bytes at p = 4",
            ),
        )
    ]
    + [
        Claim(
            name="counted-data-parallel-bytes",
            area="parallel.data_parallel",
            source=f"{NCCL_TESTS}, factor 2(n−1)/n at n = 4",
            what=f"bytes that a rank of DataParallel sends in a step over the gradient's, {RANKS} ranks, counted",
            unit="",
            published=1.5,
            digits=2,
            formula=True,
            compute=lambda: counted()["DataParallel sends"] / 2,
        )
    ]
    + [
        Claim(
            name=f"counted-zero-{stage}-communication",
            area="parallel.zero3" if stage == 3 else "parallel.zero",
            source=f"{ZERO}, section {section}",
            what=f"bytes that a rank sends in a step of ZeRO{stage} over those of DataParallel, {RANKS} ranks, counted",
            unit="×",
            published=published,
            digits=1,
            compute=lambda stage=stage: counted()[f"ZeRO{stage} sends"] / counted()["DataParallel sends"],  # type: ignore[misc]
        )
        for stage, published, section in ((2, 1.0, "7.2.1"), (3, 1.5, "7.2.2"))
    ]
    + [
        Claim(
            name=f"counted-zero-{stage}-memory",
            area="parallel.zero3" if stage == 3 else "parallel.zero",
            source=f"{ZERO}, Table 1",
            what=f"model state of a rank of ZeRO{stage} with {RANKS} ranks, counted for each parameter, times 7.5 B",
            unit="GB",
            published=published,
            digits=digits,
            compute=lambda stage=stage: counted()[f"ZeRO{stage} holds"] * SEVEN_B / 1e9,  # type: ignore[misc]
        )
        for stage, published, digits in ((1, 52.5, 1), (2, 41.3, 1), (3, 30.0, 0))
    ]
    + [
        Claim(
            name=f"counted-power-sgd-rank-{rank}",
            area="parallel.compress",
            source=POWER_SGD,
            what=f"bytes that DataParallel sends for ResNet-18 plain over those with PowerSGD({rank}), counted",
            unit="×",
            published=published,
            digits=0,
            compute=lambda rank=rank: counted()[f"PowerSGD {rank}"],  # type: ignore[misc]
        )
        for rank, published in ((1, 243), (2, 136), (4, 72))
    ]
)

CLAIMS = [
    *ZERO_MEMORY,
    *ACTIVATIONS,
    *TRAINING,
    *PIPELINES,
    *COMPRESSION,
    *RECOMPUTATION,
    *SPECULATION,
    *COUNTED,
]
