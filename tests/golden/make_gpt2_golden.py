"""Make gpt2.npz: what Hugging Face's GPT-2 in PyTorch computes with random weights.

    pip install -e ".[oracle]" && python tests/golden/make_gpt2_golden.py

`weights/...` are the parameters under Hugging Face's names, `gradients/...` some gradients of the
loss. Made with torch 2.13.0 and transformers 5.23.0. The comparison is in tests/models/test_gpt.py.
"""

import pathlib

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, POSITIONS, HIDDEN, LAYERS, HEADS = 61, 24, 32, 2, 4
BATCH = 3
GRADIENTS = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.0.attn.c_attn.weight",
)


def main() -> None:
    """Write the file beside this script."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_new",
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than at the start of training, and no bias or scale left at 0 or 1.
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + 0.15 * torch.randn_like(weight))
    tokens = torch.randint(VOCABULARY, (BATCH, POSITIONS + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))
    loss.backward()

    parameters = dict(model.named_parameters())
    arrays = {f"weights/{name}": weight.detach() for name, weight in parameters.items()}
    arrays |= {f"gradients/{name}": parameters[name].grad for name in GRADIENTS}
    arrays |= {
        "tokens": inputs.to(torch.int32),
        "targets": targets.to(torch.int32),
        "logits": logits.detach(),
        "loss": loss.detach(),
    }
    path = pathlib.Path(__file__).with_name("gpt2.npz")
    np.savez_compressed(path, **{name: array.numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main()
