"""The demo's language model over characters. The attention function is an argument of each forward pass."""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional as F

from ..format import InputError


@dataclass(frozen=True)
class Setup:
    """The model and its training."""

    blocks: int
    heads: int
    width: int
    context: int        # characters
    batch: int          # texts per step
    steps: int
    rate: float         # learning rate
    dtype: torch.dtype  # of attention
    tolerance: float    # nats per character by which the last two losses may differ


# a context of two interpreted tiles, so that the loop over keys takes more than one step
ON_CPU = Setup(2, 2, 64, 128, 1, 30, 0.005, torch.float32, 0.001)
# training amplifies the rounding of bfloat16, with either attention
ON_GPU = Setup(6, 6, 384, 1024, 8, 300, 0.001, torch.bfloat16, 0.05)


class Block(nn.Module):
    """Attention, then an MLP, each with a layer norm before and a residual connection around it."""

    def __init__(self, setup):
        super().__init__()
        width, self.heads = setup.width, setup.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        # no bias: a key's bias has gradient 0, so its error would be rounding alone
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, attention):
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class Model(nn.Module):
    """Map texts [batch, n + 1] to the loss in nats per character and logits [batch, n, characters]."""

    def __init__(self, setup, characters):
        super().__init__()
        self.character, self.position = nn.Embedding(characters, setup.width), nn.Embedding(setup.context, setup.width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(setup) for _ in range(setup.blocks))
        self.norm, self.head = nn.LayerNorm(setup.width), nn.Linear(setup.width, characters)

    def forward(self, texts, attention):
        x = self.character(texts[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = block(x, attention)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()), logits


def read_text(path: str | None, min_length: int) -> str:
    """Return the text of the file at `path`, or else Python's own documentation. InputError: unreadable or too short."""
    if path is None:
        return "\n\n".join(text for _, text in sorted(topics.topics.items()))
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text: expected a readable file in UTF-8, got {path!r} ({error})") from None
    if len(text) < min_length:
        raise InputError(f"text: expected at least {min_length} characters, the context and 2, got {len(text)} in {path!r}")
    return text


def encode(text: str):
    """Return the index of each character [len(text)], and how many different characters there are."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    characters, indices = points.unique(return_inverse=True)
    return indices, len(characters)


def batches(indices, setup: Setup, seed: int):
    """Yield texts [batch, context + 1] from random positions, without end."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(indices) - setup.context, (setup.batch, 1), generator=rng)
        yield indices[starts + torch.arange(setup.context + 1)]
