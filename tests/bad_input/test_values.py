"""Values of the config that no run can have: no numbers, beyond all sense, of another type."""

import pytest
from bad_inputs import bad

FINITE = "is not a finite number: give one"
HUGE = "9" * 30

NOT_FINITE = [
    bad(f"{key}={value}", says=f"{key}={shown} ... {FINITE}")
    for key, value, shown in (
        ("optimizer.learning_rate", "nan", "nan"),
        ("optimizer.weight_decay", "inf", "inf"),
        ("optimizer.clip_norm", "-inf", "-inf"),
        ("optimizer.eps", "1e400", "inf"),
        ("model.dropout", "nan", "nan"),
        ("data.valid_fraction", "-inf", "-inf"),
        ("train.tokens", "1e999", "inf"),
        ("train.sample_temperature", "nan", "nan"),
        ("cluster.device.memory_gib", "nan", "nan"),
        ("cluster.device.peak_tflops.fp32", "inf", "inf"),
        ("cluster.inter_host.gbit_per_s", "1e400", "inf"),
        ("cluster.intra_host.latency_us", "-inf", "-inf"),
    )
]

BELOW = [
    bad(f"{key}={value}", says=f"{key}={shown} is less than {least}: give {key}={least} or more")
    for key, value, shown, least in (
        ("optimizer.learning_rate", "-1", "-1.0", 0),
        ("optimizer.beta2", "-0.5", "-0.5", 0),
        ("model.dropout", "-1e-9", "-1e-09", 0),
        ("train.tokens", "-1", "-1.0", 1),
        ("seed", "-3", "-3", 0),
        ("train.steps", "-3", "-3", 1),
        ("train.global_batch", "0", "0", 1),
        ("train.eval_every", "-1", "-1", 0),
        ("model.hidden", "-64", "-64", 1),
        ("model.seq_len", "0", "0", 1),
        ("cluster.hosts", "0", "0", 1),
        ("parallel.dp", "-1", "-1", 1),
        ("parallel.num_microbatches", "0", "0", 1),
        ("optimizer.warmup_steps", "-1", "-1", 0),
    )
]

ABOVE = [
    bad(f"{key}={value}", says=f"{key}={value} is more than {most}: give {least} to {most}")
    for key, value, least, most in (
        ("seed", HUGE, 0, 2**63 - 1),
        ("train.steps", HUGE, 1, 2**31 - 1),
        ("train.global_batch", 10**18, 1, 10**7),
        ("train.eval_every", HUGE, 0, 2**31 - 1),
        ("train.eval_batches", 2**31, 0, 2**31 - 1),
        ("train.sample_tokens", HUGE, 0, 2**31 - 1),
        ("train.sample_top_k", HUGE, 0, 2**31 - 1),
        ("optimizer.warmup_steps", HUGE, 0, 2**31 - 1),
        ("model.layers", 10**12, 1, 10_000),
        ("model.hidden", 10**12, 1, 2**31 - 1),
        ("model.vocab_size", HUGE, 1, 2**31 - 1),
        ("model.seq_len", 10**12, 1, 2**31 - 1),
        ("parallel.num_microbatches", 10**18, 1, 2**16),
        ("parallel.tp", HUGE, 1, 2**31 - 1),
        ("parallel.zero", 4, 0, 3),
    )
] + [
    bad("optimizer.learning_rate=1e300", says="optimizer.learning_rate=1e+300 ... less than 1e+30"),
    bad("model.dropout=1", says="model.dropout=1.0 is not less than 1 ... less than 1"),
    bad("optimizer.beta1=1.5", says="optimizer.beta1=1.5 is not less than 1 ... give at least 0"),
    bad("cluster.hosts=1000000", says="cluster.hosts=1000000 is not in 1..100000: correct it"),
    bad("cluster.devices_per_host=9999", says="cluster.devices_per_host=9999 ... 1..1024: correct"),
    bad(
        "cluster.device.memory_gib=1e300", says="cluster.device.memory_gib=1e+300 ... 1e-09..1e+30"
    ),
    bad("cluster.device.memory_gib=-1", says="memory_gib=-1.0 is not above 0: write a positive"),
    bad(
        "cluster.device.matmul_efficiency.fp32=2", says="efficiency.fp32=2.0 ... 1e-09..1: correct"
    ),
    bad("cluster.device.reserved_gib=3", says="cluster.device.reserved_gib=3.0 is not in 0..2"),
    bad("cluster.intra_host.gb_per_s=1e-300", says="intra_host.gb_per_s=1e-300 is not in 1e-09.."),
]

WHOLE, TEXT, TRUTH = "give a whole number", "give a text", "give true or false"
WRONG_TYPE = [
    bad(f"{key}={value}", says=f"{key}={value} is of the wrong type: {cure}")
    for key, value, cure in (
        ("seed", "true", WHOLE),
        ("seed", "0x10", WHOLE),
        ("seed", "float(nan)", WHOLE),
        ("train.steps", "1e3", WHOLE),
        ("train.steps", "''", WHOLE),
        ("train.steps", "", WHOLE),
        ("train.steps", "[1]", WHOLE),
        ("train.steps", "@x", WHOLE),
        ("model.heads", "{a: 1}", f"{WHOLE} or null"),
        ("parallel.tp", "two", f"{WHOLE} or null"),
        ("model.size", "null", TEXT),
        ("model.dtype", "[fp32]", TEXT),
        ("train.sample_prompt", "{}", TEXT),
        ("debug", "maybe", TRUTH),
        ("train.export_weights", "often", TRUTH),
        ("optimizer.learning_rate", "fast", "give a number"),
        ("optimizer.learning_rate", "[1e-3]", "give a number"),
        ("data.valid_fraction", "null", "give a number"),
        ("logger.tags", "a", "give a list such as [a,b]"),
        ("train.trace_steps", "2", "give a list of steps"),
        ("hydra.run.dir", "null", TEXT),
    )
]

# Each alone could be; not together, or not of such a model, or not on such a machine.
IMPOSSIBLE = [
    bad("model.hidden=100", "model.heads=3", says="model.hidden=100 ... such as model.hidden=99"),
    bad("model.heads=7", says="model.heads=7 ... choose a divisor of model.hidden=64"),
    bad("model.loss_chunks=7", says="model.loss_chunks=7 ... choose a divisor of model.seq_len=64"),
    bad(
        "train.global_batch=7", "parallel.num_microbatches=2", says="global_batch=7 ... a multiple"
    ),
    bad("mode=plan", "parallel.num_microbatches=7", says="num_microbatches=7 ... set parallel.num"),
    bad(
        "parallel=data", "parallel.tp=2", says="parallel.tp=2 contradicts ... leave it out, or take"
    ),
    bad("parallel=single", "parallel.zero=1", says="parallel.zero=1 contradicts ... leave it out"),
    bad("parallel=from_file", says="parallel.path=null: give parallel.path=<plan.json of a run>"),
    bad(
        "parallel.path=p.json", says="parallel.path=p.json contradicts ... take parallel=from_file"
    ),
    bad("mode=eval", "train.eval_batches=0", says="train.eval_batches=0: give 1 or more"),
    bad("mode=profile", "runtime=emulate", says="runtime=emulate contradicts ... leave it out"),
    bad("train.trace_steps=[0]", says="train.trace_steps=[0] names step 0 ... give steps from 1"),
    bad(
        "train.sample_tokens=1", "train.sample_prompt=''", says="train.sample_prompt is ... give a"
    ),
    bad("model=wrn", "model.depth=51", says="model.depth=51 ... choose"),
    bad("model=moe", "model.experts=1", says="model.experts=1): set 2 or more"),
    bad("model=moe", "model.capacity_factor=nan", says="model.capacity_factor=nan ... give one"),
    bad("model=wrn", "data=text", says="data=text ... take"),
    bad("model.vocab_size=100", says="model.vocab_size=100 is below 256 ... model.vocab_size=256"),
    bad(
        "model=wrn", "model.num_classes=3", says="data=digits ... give model.num_classes=10 or more"
    ),
    bad(
        "data.valid_fraction=1", says="data.valid_fraction=1.0 is not less than 1: give at least 0"
    ),
    bad("model.seq_len=300000", says="model.seq_len=300000 ... or a smaller model.seq_len"),
    bad("optimizer.loss_scale=-1", says="optimizer.loss_scale=-1 ... give"),
    bad("plan.why_not=[{}]", says="plan.why_not[0] ... give a mapping, such as {pp: 1}"),
    bad("plan.why_not=[{pp: 1.5}]", says="plan.why_not[0].pp=1.5 ... give a whole number"),
    bad("parallel=manual", "parallel.pp=999", "mode=plan", says="parallel.pp=999 ... set"),
]

CASES = [*NOT_FINITE, *BELOW, *ABOVE, *WRONG_TYPE, *IMPOSSIBLE]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_value_that_cannot_be_is_refused(case, refuse):
    refuse(case)
