"""Attention on NumPy arrays: exact, with a quantised key/value cache, and its gradients.

python numpy_attention.py
"""

import numpy as np

import umfa


def main() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 8, 512, 64), dtype=np.float32)  # [batch, heads, tokens, channels]
    k, v = rng.standard_normal((2, 1, 2, 512, 64), dtype=np.float32)  # four query heads share a key and value head

    output, lse = umfa.attention(q, k, v, causal=True, return_lse=True)
    print(f"output {output.shape} {output.dtype}, logsumexp {lse.shape}")

    for dtype in ("int8", "int4"):
        keys, values = umfa.quantize(k, dtype), umfa.quantize(v, dtype)
        error = umfa.attention(q, keys, values, causal=True) - output
        size = 100 * (keys.nbytes + values.nbytes) / (k.nbytes + v.nbytes)
        print(f"{dtype} keys and values: {size:.0f} % of the memory, RMSE {np.sqrt(np.mean(error**2)):.5f}")

    grad_output = rng.standard_normal(output.shape, dtype=np.float32)
    gradients = umfa.attention_backward(grad_output, q, k, v, output, lse, causal=True)
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        print(f"gradient of {name}: {gradient.shape}, norm {np.linalg.norm(gradient):.3f}")

    with umfa.MFAContext(num_threads=1) as ctx:
        tokens_first = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]  # views: nothing is copied, strides say where elements lie
        again = umfa.flash_attention_forward(ctx, *tokens_first, causal=True)
    print("the same in the other layout, on one thread:", np.array_equal(again.transpose(0, 2, 1, 3), output))


if __name__ == "__main__":
    main()
