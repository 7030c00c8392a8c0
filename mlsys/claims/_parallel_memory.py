"""Published numbers about what a device holds in training: ZeRO's shares, activations, and what is computed twice."""

from __future__ import annotations

from mlsys.claims.core import Claim
from mlsys.perf import activations, checkpointing, transformer, zero
from mlsys.perf.configs import Config, gpt

ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198"
REVOLVE = "Griewank & Walther 2000, doi:10.1145/347837.347846, equation for t(l, s)"

SEVEN_B, TRILLION = 7.5e9, 1e12


def zero_gb(parameters: float, n: int, stage: int) -> float:
    """Model state of one of n devices, GB; 16-bit weights and gradients, 12 bytes a parameter for Adam."""
    return zero.memory(parameters, n, stage).total / 1e9


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
