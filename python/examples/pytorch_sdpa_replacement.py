"""umfa.MetalSDPA in place of PyTorch's scaled dot-product attention: the same call, and by how much the results differ.

pip install 'umfa[torch]'
python pytorch_sdpa_replacement.py
"""

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's custom)

import umfa


def main() -> None:
    torch.manual_seed(0)
    metal_sdpa = umfa.MetalSDPA()
    q, k, v = (torch.randn(2, 8, 256, 64) for _ in range(3))
    padding = torch.arange(256) < torch.tensor([256, 200])[:, None, None, None]  # True: attend; [batch, 1, 1, keys]

    calls = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean mask": {"attn_mask": padding},
        "additive mask": {"attn_mask": torch.randn(256, 256)},
        "scale": {"scale": 0.05},
    }
    print(f"{'call':<28}{'largest difference':>20}")
    for name, options in calls.items():
        show(name, metal_sdpa(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))

    grouped = {"enable_gqa": True, "is_causal": True}
    show("grouped heads", metal_sdpa(q, k[:, :2], v[:, :2], **grouped), F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], **grouped))
    half = [tensor.to(torch.bfloat16) for tensor in (q, k, v)]
    show("bfloat16", metal_sdpa(*half), F.scaled_dot_product_attention(*half))
    for dtype in ("int8", "int4"):
        show(f"{dtype} beside exact", umfa.MetalSDPA(quantize=dtype)(q, k, v), F.scaled_dot_product_attention(q, k, v))


def show(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    print(f"{name:<28}{(ours - theirs).abs().max().item():>20.2e}")


if __name__ == "__main__":
    main()
