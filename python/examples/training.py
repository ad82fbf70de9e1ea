"""Train a small transformer through umfa's attention, exact and in INT8, beside PyTorch's own.

The model reads additions such as "17+5=22" and predicts each character from those before. Gradients pass quantisation straight through.

pip install 'umfa[torch]'
python training.py
"""

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's custom)
from torch import nn

import umfa

CHARACTERS = "0123456789+= "
LENGTH = 8
HEADS = 4
STEPS = 100


class Block(nn.Module):
    def __init__(self, attention, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Views of one packed tensor, which are read where they lie.
        q, k, v = self.query_key_value(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(self.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


def sums(count: int) -> torch.Tensor:
    """Random additions as numbers of characters, [count, LENGTH]."""
    pairs = torch.randint(0, 50, (count, 2)).tolist()
    return torch.tensor([[CHARACTERS.index(character) for character in f"{a}+{b}={a + b}".ljust(LENGTH)] for a, b in pairs])


def losses(attention, width: int = 64) -> list[float]:
    """Train anew, always from the same start on the same data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(len(CHARACTERS), width), *(Block(attention, width) for _ in range(2)), nn.Linear(width, len(CHARACTERS))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    found = []
    for _ in range(STEPS):
        batch = sums(32)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    attentions = {
        "PyTorch": F.scaled_dot_product_attention,
        "umfa": umfa.MetalSDPA(),
        "umfa, INT8": umfa.MetalSDPA(quantize="int8"),
    }
    print(f"{'loss after':<14}" + "".join(f"{step:>10}" for step in (1, 10, 50, STEPS)))
    for name, attention in attentions.items():
        found = losses(attention)
        print(f"{name:<14}" + "".join(f"{found[step - 1]:>10.4f}" for step in (1, 10, 50, STEPS)))


if __name__ == "__main__":
    main()
