"""Primitives that deliberately have no rule, and why: the error that names one says so.

A guess would be a wrong plan, so there is no fallback. (A primitive that is in no list at all is one that
nobody has thought of yet.)
"""

_EFFECT = "what it does outside the computation would happen on every device, as often as it is run"
_COLLECTIVE = "the planner places collectives itself, and its mesh axes are not the model's"
_PLACED = "it says where to compute, which is the plan's business"
_KERNEL = "nothing says how a hand-written kernel may be split"
_UNCOMPILED = "XLA's CPU backend cannot compile it inside `shard_map` (jaxlib 0.10.2)"
_STATE = "it works on mutable references, which have no dataflow to plan"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("debug_callback", "debug_print", "io_callback", "pure_callback", "outside_call", "check"),
        _EFFECT,
    ),
    **dict.fromkeys(
        ("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather", "all_to_all",
         "reduce_scatter", "axis_index", "pbroadcast"),
        _COLLECTIVE,
    ),
    **dict.fromkeys(("shard_map", "custom_partitioning", "reshard", "compute_on"), _PLACED),
    **dict.fromkeys(
        ("pallas_call", "ffi_call", "tpu_custom_call", "dot_product_attention_fp8_fwd_wrapper",
         "dot_product_attention_fp8_bwd_wrapper"),
        _KERNEL,
    ),
    "mulhi": _UNCOMPILED,
    **dict.fromkeys(("get", "swap", "addupdate", "new_ref", "freeze"), _STATE),
}  # fmt: skip
