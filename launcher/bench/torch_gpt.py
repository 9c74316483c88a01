"""The GPT of `launcher.models.gpt` in PyTorch, as one would train it there: a peer of the GPU benchmark.

`torch.compile`, `scaled_dot_product_attention` (flash attention, or cuDNN's where PyTorch prefers it),
products in bf16 over weights in fp32, a fused AdamW. Weights have the names and shapes that they have in the
launcher. It runs as a process of its own, because JAX keeps most of a GPU's memory once it has started:

    python -m launcher.bench.torch_gpt '{"size": {"hidden": 1024, ...}, "batch": 8, "steps": 20}'

prints a line of JSON: `step_s`, `num_microbatches` and `version`, or `left_out`, why there is no time.

PyTorch is optional, and imported where it is used. Left out: dropout and untied embeddings.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launcher.bench.step_timing import median_step_s

# torch.Tensor by path; the package need not be there.
Weights = Mapping[str, Any]

_STDDEV = 0.02
_EPSILON = 1e-5
_CLIP_NORM = 1.0
_LEARNING_RATE = 1e-3


def shapes(size: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The weights' shapes by path, as the model of the launcher has them."""
    hidden, width = size["hidden"], size["mlp_factor"] * size["hidden"]
    found = {
        "embedding/token": (size["vocab_size"], hidden),
        "embedding/position": (size["seq_len"], hidden),
        **_affine("final_norm/scale", (hidden,)),
    }
    for index in range(size["layers"]):
        block = f"blocks/{index}"
        found |= _affine(f"{block}/attention_norm/scale", (hidden,))
        found |= _affine(f"{block}/attention/qkv/kernel", (hidden, 3 * hidden))
        found |= _affine(f"{block}/attention/out/kernel", (hidden, hidden))
        found |= _affine(f"{block}/mlp_norm/scale", (hidden,))
        found |= _affine(f"{block}/mlp/up/kernel", (hidden, width))
        found |= _affine(f"{block}/mlp/down/kernel", (width, hidden))
    return found


def _affine(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A factor and its bias."""
    return {path: shape, f"{path.rpartition('/')[0]}/bias": shape[-1:]}


def make_loss(size: Mapping[str, int], compute: Any) -> Callable[[Weights, Any, Any], Any]:
    """The mean cross entropy of the next token, from weights, tokens and targets.

    Args:
        compute: The torch.dtype of products and of activations.
    """
    from torch.nn import functional

    heads = size["heads"]

    def linear(weights, path, x):
        kernel, bias = (weights[f"{path}/{name}"].to(compute) for name in ("kernel", "bias"))
        return functional.linear(x, kernel.t(), bias)

    def norm(weights, path, x):
        scale, bias = weights[f"{path}/scale"], weights[f"{path}/bias"]
        return functional.layer_norm(x.float(), x.shape[-1:], scale, bias, _EPSILON).to(compute)

    def attention(weights, path, x):
        fused = linear(weights, f"{path}/qkv", x).unflatten(-1, (heads, 3, -1))
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return linear(weights, f"{path}/out", mixed.transpose(1, 2).flatten(2))

    def mlp(weights, path, x):
        raised = functional.gelu(linear(weights, f"{path}/up", x), approximate="tanh")
        return linear(weights, f"{path}/down", raised)

    def loss(weights, tokens, targets):
        table = weights["embedding/token"]
        x = functional.embedding(tokens, table).to(compute)
        x = x + weights["embedding/position"][: tokens.shape[1]].to(compute)
        for index in range(size["layers"]):
            block = f"blocks/{index}"
            x = x + attention(
                weights, f"{block}/attention", norm(weights, f"{block}/attention_norm", x)
            )
            x = x + mlp(weights, f"{block}/mlp", norm(weights, f"{block}/mlp_norm", x))
        logits = functional.linear(norm(weights, "final_norm", x), table.to(compute))
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return loss


def measure(size: Mapping[str, int], batch: int, steps: int, device: str) -> dict[str, Any]:
    """Time the training step, with as few microbatches as the memory allows."""
    import torch

    for count in (number for number in range(1, batch + 1) if batch % number == 0):
        # In a function of its own, so that a try that failed leaves no weights behind.
        with contextlib.suppress(torch.OutOfMemoryError):
            step_s = _step_s(size, batch, count, steps, device)
            return {"step_s": step_s, "num_microbatches": count, "version": torch.__version__}
        torch.cuda.empty_cache()
    return {"left_out": f"out of device memory, also with {batch} microbatches"}


def _step_s(size: Mapping[str, int], batch: int, count: int, steps: int, device: str) -> float:
    import torch

    def wait(_: None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return median_step_s(_training(size, batch, count, device), wait, steps)


def _training(size: Mapping[str, int], batch: int, count: int, device: str) -> Callable[[], None]:
    """The training step of `batch` samples in `count` microbatches."""
    import torch

    torch.manual_seed(0)
    weights = {path: torch.nn.Parameter(value) for path, value in _draw(size, device)}
    drawn = torch.randint(size["vocab_size"], (2, batch, size["seq_len"]), device=device)
    microbatches = [part.unbind(0) for part in drawn.chunk(count, dim=1)]
    loss = torch.compile(make_loss(size, torch.bfloat16))
    optimizer = torch.optim.AdamW(weights.values(), lr=_LEARNING_RATE, fused=True)

    def step() -> None:
        for tokens, targets in microbatches:
            (loss(weights, tokens, targets) / count).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), _CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _draw(size: Mapping[str, int], device: str) -> Iterator[tuple[str, Any]]:
    import torch

    constants = {"scale": 1.0, "bias": 0.0}
    for path, shape in shapes(size).items():
        name = path.rpartition("/")[2]
        if name in constants:
            yield path, torch.full(shape, constants[name], device=device)
        else:
            yield path, torch.randn(shape, device=device) * _STDDEV


def main(arguments: Sequence[str]) -> int:
    """Time what the request asks for."""
    import torch

    request = json.loads(arguments[0])
    answer = {"left_out": f"torch {torch.__version__} sees no CUDA device"}
    if torch.cuda.is_available():
        answer = measure(**request, device="cuda")
    sys.stdout.write(f"{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
