"""umfa.MetalSDPA as the attention of a model of the transformers library, beside PyTorch's: a padded batch, generation, gradients.

pip install 'umfa[transformers]'
python transformers_attention.py
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import umfa

metal_sdpa = umfa.MetalSDPA()


def umfa_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention of one layer, as the library asks for it. A decoder's is causal without a mask; a single token sees all."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    output = metal_sdpa(query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def main() -> None:
    AttentionInterface.register("umfa", umfa_attention)
    AttentionMaskInterface.register("umfa", sdpa_mask)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    tokens = torch.randint(0, 100, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # the first text is shorter

    logits, texts, gradients = {}, {}, {}
    for name in ("sdpa", "umfa"):
        model.set_attn_implementation(name)
        logits[name] = model(tokens, attention_mask=mask).logits[mask.bool()].detach()
        texts[name] = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
        loss = model(tokens, labels=tokens).loss
        gradients[name] = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    print(f"{'logits, largest difference':<32}{(logits['sdpa'] - logits['umfa']).abs().max().item():.2e}")
    print(f"{'gradients, largest difference':<32}{(gradients['sdpa'] - gradients['umfa']).abs().max().item():.2e}")
    print(f"{'the same text':<32}{torch.equal(texts['sdpa'], texts['umfa'])}")


if __name__ == "__main__":
    main()
