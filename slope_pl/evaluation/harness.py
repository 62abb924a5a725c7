"""A GPT-2 of this package as a model of the LM Evaluation Harness (``lm_eval``, the extra ``eval``).

The same log-likelihoods as the harness' own ``HFLM`` of the exported weights, by a shorter way: the head is applied where a
token is scored and nowhere else, and requests with the same input, such as the letters of a question, share one pass.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from slope_pl.data.bpe import TextTokenizer
from slope_pl.errors import ConfigError
from slope_pl.models.gpt2 import GPT2

Answer = tuple[float, bool]
Request = tuple[tuple[str, str] | None, list[int], list[int]]

_TEXTS = 1024  # texts tokenised between two moves of the bar
_HEAD_ROWS = 1024  # positions the head reads at once: 1024 rows of 50,257 logits are 200 MB in float32
_MULTIPLE = 64  # lengths are padded to multiples of this where shapes are fixed
_STRIDE = 16  # tokens generated between two looks for a stop sequence
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}


class GPT2LM(TemplateLM):
    """Scores and continues text with a :class:`~slope_pl.models.GPT2`, dense or with sparse layers.

    What is longer than ``n_positions`` loses its beginning, as in the harness' ``HFLM``. An empty context is the
    end-of-text token. One process, one device.

    Args:
        model: moved to ``device`` and ``dtype`` in place, and set to evaluation.
        tokenizer: the one the model was trained with; its vocabulary may be smaller than the model's, not larger.
        batch_size: rows a forward pass.
        device: None leaves the model where it is.
        dtype: of the weights and products; probabilities are float32 whatever it is. None leaves the weights as they are.
        progress: whether to draw bars.

    Raises:
        ConfigError: if the tokenizer has tokens that the model lacks, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: TextTokenizer,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}, expected at least 1.")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {model.config.vocab_size}: they do "
                "not belong together. Give the tokenizer the model was trained with."
            )
        self.model = model.to(device=device, dtype=dtype).eval()
        self.bpe = tokenizer
        self.batch_size = batch_size
        self.progress = progress
        self._encoded: dict[str, list[int]] = {}
        self._device = model.wte.weight.device
        # On a GPU a sparse product makes a plan for each number of rows: a few shapes then, and not one a batch.
        self.fixed_shapes = self._device.type == "cuda"

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token, which also stands for an empty context."""
        return self.bpe.end_of_text

    @property
    def max_length(self) -> int:
        """Longest input in tokens: ``n_positions``."""
        return self.model.config.n_positions

    @property
    def max_gen_toks(self) -> int:
        """How many tokens are generated where a task does not say: 256, as in ``HFLM``."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others in the harness' cache of requests."""
        return f"bpe-{self.bpe.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; there are no special tokens to add."""
        if (known := self._encoded.get(string)) is not None:
            return known
        return self.bpe.encoder.encode(string, add_special_tokens=False).ids

    # -------------------------------------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-likelihood in nats of each continuation of a context, and whether it is the likeliest.

        As the harness', but each text is tokenised once, and its words too: the answers to a question share its text.
        """
        arguments = [request.args for request in requests]
        # What _encode_pair will ask for; spaces at the end of a context go to the continuation there.
        texts = [text for context, answer in arguments for text in (context.rstrip(), context + answer)]
        self._encoded = self._encode_all(list(dict.fromkeys(texts)), disable_tqdm)
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _encode_all(self, texts: list[str], disable_tqdm: bool) -> dict[str, list[int]]:
        encoded: dict[str, list[int]] = {}
        with tqdm(total=len(texts), desc="Tokenizing", disable=disable_tqdm or not self.progress) as bar:
            for start in range(0, len(texts), _TEXTS):
                part = texts[start : start + _TEXTS]
                encoded |= zip(part, self.bpe.encode_batch(part), strict=True)
                bar.update(len(part))
        return encoded

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats: each token once, in windows of ``n_positions``."""
        windows: list[Request] = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        """Log-likelihood in nats of each continuation, and whether every token of it is the likeliest one."""
        self._check(requests)
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            # The last token is predicted, never read.
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)
        # The longest first: a batch that does not fit in memory fails at once.
        inputs = sorted(sharing, key=len, reverse=True)
        answers: list[Answer] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="Log-likelihoods", disable=disable_tqdm or not self.progress)
        with (
            bar,
            torch.no_grad(),
        ):  # not inference_mode: what sparse layers keep between passes may be trained with later
            for start in range(0, len(inputs), self.batch_size):
                rows = inputs[start : start + self.batch_size]
                members = [(row, index) for row, tokens in enumerate(rows) for index in sharing[tokens]]
                continuations = [requests[index][2] for _, index in members]
                scores = self._score(rows, [row for row, _ in members], continuations)
                for (_, index), answer in zip(members, scores, strict=True):
                    answers[index] = answer
                    if (key := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update(len(members))
        return answers

    def _score(self, rows: list[tuple[int, ...]], owners: list[int], continuations: list[list[int]]) -> list[Answer]:
        """Run the inputs ``rows`` as one batch; continuation i ends one token after the end of row ``owners[i]``."""
        ids = torch.zeros(self._shape(rows), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)  # padded on the right, where causal attention never looks
        places = [
            (row, len(rows[row]) - len(continuation) + offset, token)
            for row, continuation in zip(owners, continuations, strict=True)
            for offset, token in enumerate(continuation)
        ]
        hidden = self.model.hidden_states(ids.to(self.device))
        values, likeliest = [], []
        for piece in torch.tensor(places).to(self.device).split(_HEAD_ROWS):
            row, position, token = piece.unbind(1)
            logits: Tensor = self.model.lm_head(hidden[row, position]).float()
            values.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0].double())
            likeliest.append(logits.argmax(-1) == token)
        lengths = [len(continuation) for continuation in continuations]
        sums = torch.cat(values).cpu().split(lengths)
        greedy = torch.cat(likeliest).cpu().split(lengths)
        return [(float(value.sum()), bool(best.all())) for value, best in zip(sums, greedy, strict=True)]

    def _shape(self, rows: list[tuple[int, ...]]) -> tuple[int, int]:
        longest = max(map(len, rows))
        if not self.fixed_shapes:
            return len(rows), longest
        return self.batch_size, min(-(-longest // _MULTIPLE) * _MULTIPLE, self.max_length)

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuse what cannot be scored before the first pass, not an hour later."""
        for key, context, continuation in requests:
            if not context or not continuation:
                raise ConfigError(f"nothing to score: context and continuation of {key!r} need a token each.")
        longest = max(requests, key=lambda request: len(request[2]), default=None)
        if longest is not None and len(longest[2]) > self.max_length:
            too_long = sum(len(continuation) > self.max_length for _, _, continuation in requests)
            text = repr(longest[0][1][:60]) if longest[0] else "a window"
            raise ConfigError(
                f"{too_long} of {len(requests)} continuations are longer than the model's n_positions={self.max_length}, the "
                f"longest has {len(longest[2])} tokens ({text}...). A context can be cut, what is scored cannot: leave the "
                "task out, or use a model with more positions."
            )

    # -------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop sequence, which is not part of the answer; one context at a time.

        Raises:
            ConfigError: if a task asks for a setting other than until, max_gen_toks, do_sample, temperature and top_k.
        """
        answers = []
        for request in tqdm(requests, desc="Generations", disable=disable_tqdm or not self.progress):
            context, settings = request.args
            if unknown := sorted(settings.keys() - _GENERATION):
                raise ConfigError(f"generation setting {unknown[0]!r} is not known here, only {sorted(_GENERATION)}.")
            answers.append(self._generate(context, **settings))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers

    def _generate(
        self,
        context: str,
        until: str | Sequence[str] = (),
        max_gen_toks: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> str:
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        total = max_gen_toks or self.max_gen_toks
        tokens = torch.tensor([self.tok_encode(context) or [self.prefix_token_id]], device=self.device)
        start, heat = tokens.shape[1], float(temperature) if do_sample else 0.0
        # The harness seeds Python, numpy and torch; Python's decides here, on every device alike.
        generator = torch.Generator(self.device).manual_seed(random.getrandbits(63)) if heat else None
        text = ""
        while (made := tokens.shape[1] - start) < total:
            tokens = self.model.generate(tokens, min(_STRIDE, total - made), heat, top_k, generator)
            new: list[int] = tokens[0, start:].tolist()
            ended = self.eot_token_id in new
            text = self.bpe.decode(new[: new.index(self.eot_token_id)] if ended else new)
            if ended or any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop, 1)[0]
        return text
