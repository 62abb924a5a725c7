"""Text from a model, one window a token: no cache of keys and values, but one shape for every product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slope_pl.data import TextTokenizer
from slope_pl.models import GPT2


@torch.no_grad()
def continue_text(
    net: GPT2,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
    window: int | None = None,
) -> list[str]:
    """Continue each prompt until the model ends the document, or ``tokens`` more tokens are there.

    Every forward pass has the shape ``(len(prompts), window)``: a sparse product makes a plan for each number of rows,
    and growing texts would need hundreds of them. Padding on the right changes nothing, no token sees it.

    Args:
        net: the model; its mode and torch's global random state are left as they are.
        tokenizer: of the text it was trained on.
        prompts: beginnings; "" is the beginning of a new document.
        tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; None among all.
        seed: of the sample: the same text for the same weights on one device.
        window: tokens that the model sees; None for all its positions.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: if a number is out of range.
    """
    limit = net.config.n_positions
    window = limit if window is None else window
    for name, value, good, expected in (
        ("tokens", tokens, tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 (the likeliest token) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or null for all tokens"),
        ("window", window, 1 <= window <= limit, f"1 to {limit}, the model's positions"),
    ):
        if not good:
            raise ValueError(f"{name}={value}: {expected} is expected")
    device = net.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    rows = [[tokenizer.end_of_text, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    starts, open_rows = [len(row) for row in rows], [True] * len(rows)
    was_training = net.training
    net.eval()
    try:
        for _ in range(tokens):
            seen = [row[-window:] for row in rows]
            padded = [row + [tokenizer.end_of_text] * (window - len(row)) for row in seen]
            hidden = net.hidden_states(torch.tensor(padded, device=device))
            last = hidden[range(len(rows)), [len(row) - 1 for row in seen]]
            # A vocabulary padded to a multiple of 64 has tokens that mean nothing.
            logits = net.lm_head(last)[:, : tokenizer.vocab_size].float().cpu()
            for i, token in enumerate(_draw(logits, temperature, top_k, generator).tolist()):
                open_rows[i] = open_rows[i] and token != tokenizer.end_of_text
                if open_rows[i]:
                    rows[i].append(token)
            if not any(open_rows):
                break
    finally:
        net.train(was_training)
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token a row of ``(rows, vocab)``, on the CPU: ``(rows,)``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
