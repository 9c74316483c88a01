"""What the Alpa paper measured (OSDI 2022): TFLOP/s per device, and which runs went out of memory.

End to end: figure 7, as in `osdi22_artifact/results_e2e_ref.tsv` of Alpa's artifact. Intra-operator: figure
8, as in `results_intra_ablation_ref.tsv`. A method is called here what `paper_methods` calls its like:
Megatron-LM is `manual`, Alpa `auto`, its ILP alone `intra-op`. The rates count operations as Alpa's
benchmarks do, for GPT and MoE with one more forward pass, since they recompute (`paper_cases`).

Left out: MoE end to end, of which the sources have no figures but `MOE_SPEEDUPS`, and the ablation's
heuristic, which has no counterpart here.
"""

from collections.abc import Mapping

OUT_OF_MEMORY = 0.0
NOT_SHARED = -1.0  # no data axis of the method divides the batch

END_TO_END, INTRA_OP = "end-to-end", "intra-op"

_DEVICES = (1, 2, 4, 8, 16, 32, 64)
_OOM = OUT_OF_MEMORY


def _row(*tflops: float) -> Mapping[int, float]:
    return dict(zip(_DEVICES, tflops, strict=False))


MEASURED: Mapping[tuple[str, str, str], Mapping[int, float]] = {
    (END_TO_END, "gpt", "auto"): _row(45.07, 57.92, 58.21, 61.61, 60.0, 59.9, 57.0),
    (END_TO_END, "gpt", "manual"): _row(47.53, 55.53, 55.89, 50.44, 56.59, 58.24, 57.84),
    (END_TO_END, "gpt", "inter-op"): _row(44.23, 57.94, 53.99, 56.57, 59.68, 49.80, 50.55),
    (END_TO_END, "gpt", "intra-op"): _row(46.20, 59.54, 58.36, 50.82, 48.42, 35.07, 2.11),
    (END_TO_END, "wrn", "auto"): _row(8.3, 8.46, 8.16, 8.04, 6.76, 6.60, 5.3),
    (END_TO_END, "wrn", "pp-dp"): _row(8.3, 8.24, 8.08, 7.72, 0.37, _OOM, _OOM),
    (END_TO_END, "wrn", "inter-op"): _row(8.3, 8.46, 6.47, 5.46, 0.37, _OOM, _OOM),
    (END_TO_END, "wrn", "intra-op"): _row(8.37, 8.48, 8.15, 7.71, 4.72, 1.96, 0.70),
    (INTRA_OP, "gpt", "intra-op"): _row(68.68, 61.99, 66.44, 61.19),
    (INTRA_OP, "gpt", "data"): _row(68.44, _OOM, _OOM, _OOM),
    (INTRA_OP, "gpt", "zero-2"): _row(68.65, 61.95, 66.41, _OOM),
    (INTRA_OP, "gpt", "zero-3"): _row(68.61, 52.35, 57.83, 53.21),
    (INTRA_OP, "wrn", "intra-op"): _row(8.27, 7.90, 7.87, 8.00),
    (INTRA_OP, "wrn", "data"): _row(8.28, 6.50, _OOM, _OOM),
    (INTRA_OP, "wrn", "zero-2"): _row(8.26, 7.58, 6.95, _OOM),
    (INTRA_OP, "wrn", "zero-3"): _row(8.26, 7.36, 7.06, 5.97),
}

# Of single steps with a smaller batch, extended linearly by the authors.
EXTRAPOLATED = frozenset(
    {
        (END_TO_END, "gpt", "inter-op", 64),
        (END_TO_END, "gpt", "intra-op", 32),
        (END_TO_END, "gpt", "intra-op", 64),
        (END_TO_END, "wrn", "intra-op", 32),
        (END_TO_END, "wrn", "intra-op", 64),
    }
)

# Devices -> how many times faster than DeepSpeed (ZeRO-2 and split experts) Alpa trains the MoE; section 8.1.
MOE_SPEEDUPS: Mapping[int, float] = {16: 3.5, 32: 9.7}

MEASURED_BY: Mapping[tuple[str, str], str] = {
    ("gpt", "manual"): "Megatron-LM",
    ("wrn", "pp-dp"): "PP-DP",
}
"""(family, method) -> what the paper calls it, where that is neither Alpa nor a part of it."""
