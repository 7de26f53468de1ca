"""The demo's language model: it reads characters, and is given its attention with each call."""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional as F


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what can."""


@dataclass(frozen=True)
class Setup:
    """The model and its training."""

    blocks: int
    heads: int
    width: int
    context: int        # characters that the model sees
    batch: int          # texts per step
    steps: int
    rate: float         # of learning
    dtype: torch.dtype  # that attention works in
    tolerance: float    # nats per character that the last two losses may differ by


# a context of two interpreted tiles, so that the loop over keys has something to do
ON_CPU = Setup(2, 2, 64, 128, 1, 30, 0.005, torch.float32, 0.001)
# training magnifies what bfloat16 rounds away, whoever rounds
ON_GPU = Setup(6, 6, 384, 1024, 8, 300, 0.001, torch.bfloat16, 0.05)


class Block(nn.Module):
    """Attention, then an MLP, each behind a layer norm and added to what came in."""

    def __init__(self, setup):
        super().__init__()
        width, self.heads = setup.width, setup.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        # no bias: a key's has gradient 0, which leaves nothing to measure rounding by
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, attend):
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class Model(nn.Module):
    """Texts [batch, n + 1] to nats per character and logits [batch, n, characters]; the attention comes with each call."""

    def __init__(self, setup, characters):
        super().__init__()
        self.character, self.position = nn.Embedding(characters, setup.width), nn.Embedding(setup.context, setup.width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(setup) for _ in range(setup.blocks))
        self.norm, self.head = nn.LayerNorm(setup.width), nn.Linear(setup.width, characters)

    def forward(self, texts, attend):
        x = self.character(texts[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = block(x, attend)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()), logits


def read_text(path: str | None, least: int) -> str:
    """At least `least` characters: the file at `path`, or else the documentation that every Python carries."""
    if path is None:
        return "\n\n".join(text for _, text in sorted(topics.topics.items()))
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise InputError(f"text: expected a file that can be read, got {path!r} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise InputError(f"text: expected UTF-8, got {byte} of {path!r}") from None
    if len(text) < least:
        raise InputError(f"text: expected at least {least} characters, the context and 2, got {len(text)} in {path!r}")
    return text


def encode(text: str):
    """The number of each character [len(text)], counted from 0, and how many different ones there are."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    characters, numbers = points.unique(return_inverse=True)
    return numbers, len(characters)


def batches(numbers, setup: Setup, seed: int):
    """Texts [batch, context + 1] from random places, without end."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(numbers) - setup.context, (setup.batch, 1), generator=rng)
        yield numbers[starts + torch.arange(setup.context + 1)]
