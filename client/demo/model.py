"""A small byte-level GPT."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GPTSettings:
    """The model's size: heads of `width / num_heads`, a feed-forward layer of `4 * width`."""

    width: int = 192
    num_layers: int = 2
    num_heads: int = 4
    context_numel: int = 64


class Block(nn.Module):
    """Pre-norm attention and feed-forward layers."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.norm_1 = nn.LayerNorm(settings.width)
        self.qkv = nn.Linear(settings.width, 3 * settings.width, bias=False)
        self.out = nn.Linear(settings.width, settings.width, bias=False)
        self.norm_2 = nn.LayerNorm(settings.width)
        self.up = nn.Linear(settings.width, 4 * settings.width, bias=False)
        self.down = nn.Linear(4 * settings.width, settings.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, bytes, width), and so is the result."""
        batch, numel, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, numel, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, numel, width))
        deeper: torch.Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return deeper


class GPT(nn.Module):
    """Predicts the next byte. The first parameters depend on the seed alone."""

    def __init__(self, settings: GPTSettings, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.token = nn.Embedding(VOCABULARY, settings.width)
        self.position = nn.Embedding(settings.context_numel, settings.width)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.num_layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The layers that write into the residual stream start smaller, so that depth does not add up.
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * settings.num_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of the next byte at every position.

        Args:
            tokens: (batch, bytes) int64, at most `context_numel` bytes.

        Returns:
            (batch, bytes, 256) logits.
        """
        x: torch.Tensor = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats per byte: a scalar. Both arguments: (batch, bytes) int64."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(model: GPT, prompt: bytes, *, num_bytes: int, temperature: float = 0.7, seed: int = 0) -> bytes:
    """Continues a prompt; the same seed gives the same text.

    Args:
        model: what writes.
        prompt: at least one byte.
        num_bytes: how many bytes to add.
        temperature: below 1 the likelier bytes are preferred.
        seed: of the draws.

    Returns:
        The prompt and what was added.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)])
    for _ in range(num_bytes):
        logits = model(tokens[:, -model.settings.context_numel :])[:, -1]
        probabilities = torch.softmax(logits / temperature, dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    return bytes(tokens[0].tolist())


def params_digest(model: nn.Module) -> str:
    """The sha256 over the bytes of all parameters, in order: equal only for models equal to the bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
