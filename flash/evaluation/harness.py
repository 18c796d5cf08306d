"""Adapters of lm-evaluation-harness for a float decoder and for a .pte in its runtime.

Import this module only to run a benchmark: importing the harness takes a second.
"""

import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lm_eval.api.instance import Instance
from torch import Tensor

from flash.arch import Attention
from flash.compat.lm_eval import Pair, TokenScoringLM, generation_settings, rolling_windows
from flash.device.base import Device
from flash.errors import InputError
from flash.evaluation.tokenization import HarnessTokenizer
from flash.model.decoder import Decoder, LayerCache
from flash.progress import progress_bar
from flash.training.settings import Precision

MAX_NEW_TOKENS = 256
"""Length of answers if the task sets none, as in the harness's `hf` [tokens]."""
LOGITS_AT_ONCE = 1 << 26
"""Greatest number of logits in memory at a time: 256 MiB in float32."""
TEXTS_A_PROCESS = 512
"""Requests for each process on the device, enough to amortize loading the program."""
FIRST_ROUND = 64
"""Tokens generated on the device before the first search for stop strings."""


@dataclass(frozen=True)
class TokenRow:
    """Text to score.

    Attributes:
        tokens: Token ids, truncated from the left to the context of the model.
        scored: Number of tokens at the end that are scored.
    """

    tokens: tuple[int, ...]
    scored: int


class TextLM(TokenScoringLM):
    """Base of both adapters, which converts requests to token ids and answers to text.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Context of the model [tokens].
    """

    def __init__(self, tokenizer: HarnessTokenizer, max_length: int) -> None:
        super().__init__()
        self._tokenizer, self.max_length = tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.folder)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._tokenizer.render(
            chat_history, prompt=add_generation_prompt, continued=not add_generation_prompt
        )

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return self._score([self._row(*pair) for pair in pairs])

    def _row(self, context: list[int], continuation: list[int]) -> TokenRow:
        if not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens: expected 1 to the "
                f"{self.max_length} that the model can read"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return TokenRow(tuple(tokens), len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in rolling_windows(tokens, self.prefix_token_id, self.max_length):
                rows.append(self._row(*pair))
                owners.append(i)
        sums = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._score(rows), strict=True):
            sums[owner] += likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)
        arguments: list[Any] = [request.args for request in requests]
        for i, (_, asked) in enumerate(arguments):
            groups[json.dumps(asked, sort_keys=True)].append(i)
        answers = [""] * len(requests)
        for members in groups.values():
            task = str(requests[members[0]].task_name)
            new_tokens, until = self._limits(arguments[members[0]][1], task)
            room = self.max_length - new_tokens
            prompts = [self.tok_encode(arguments[i][0])[-room:] for i in members]
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
            written = self._continue(prompts, new_tokens, until)
            for i, tokens in zip(members, written, strict=True):
                answers[i] = self._tokenizer.answer(tokens, until)
        return answers

    def _limits(self, asked: dict[str, Any], task: str) -> tuple[int, list[str]]:
        """Return the greatest number of new tokens and the stop strings.

        Raises:
            InputError: The task asks for sampled answers, or for more than the context holds.
        """
        values = generation_settings(asked, MAX_NEW_TOKENS)
        if values["do_sample"]:
            raise InputError(f"task {task}: asks for sampled answers: expected greedy ones")
        new_tokens = values["max_gen_toks"]
        if new_tokens >= self.max_length:
            raise InputError(
                f"task {task}: answers of up to {new_tokens} tokens: expected fewer than the "
                f"{self.max_length} that the model can read; raise "
                "device.lowering.max_context and export again, or leave the task out"
            )
        return new_tokens, [stop for stop in values["until"] if stop]

    @abstractmethod
    def _score(self, rows: list[TokenRow]) -> list[tuple[float, bool]]:
        """Return each row's log-likelihood, and True if all scored tokens are the likeliest."""

    @abstractmethod
    def _continue(
        self, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[list[int]]:
        """Generate greedily until an end token, a stop string or `new_tokens` tokens."""


class DecoderLM(TextLM):
    """Adapter of a float decoder in PyTorch, which runs on the device of its weights.

    Args:
        model: Decoder to evaluate.
        tokenizer: Tokenizer of the model.
        batch_size: Number of texts in a batch.
        precision: Precision of matrix products.
        show_progress: Show bars.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: HarnessTokenizer,
        *,
        batch_size: int = 8,
        precision: Precision = Precision.fp32,
        show_progress: bool = True,
    ) -> None:
        super().__init__(tokenizer, model.spec.max_context)
        self._shown = show_progress
        self.model, self.batch_size = model.eval(), batch_size
        self._where = model.model.embed_tokens.weight.device
        self._bf16 = precision is Precision.bf16

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._where.type, torch.bfloat16, enabled=self._bf16)

    def _score(self, rows: list[TokenRow]) -> list[tuple[float, bool]]:
        # One-token answers to the same context have equal inputs, which run once.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            groups[row.tokens[:-1]].append(i)
        inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with progress_bar("scoring", len(rows), " texts", shown=self._shown) as bar:
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size]
                members = [[rows[i] for i in groups[tokens]] for tokens in batch]
                found = self._score_batch(batch, members)
                order = [i for tokens in batch for i in groups[tokens]]
                for i, answer in zip(order, found, strict=True):
                    answers[i] = answer
                bar.update(len(order))
        return answers

    @torch.no_grad()
    def _score_batch(
        self, inputs: list[tuple[int, ...]], rows: list[list[TokenRow]]
    ) -> list[tuple[float, bool]]:
        longest = len(inputs[0])
        # Padding on the right is invisible to causal attention.
        padded = [[*tokens, *[0] * (longest - len(tokens))] for tokens in inputs]
        with self._autocast():
            hidden = self.model.hidden(torch.tensor(padded, device=self._where))
        flat = [(i, row) for i, members in enumerate(rows) for row in members]
        ends = [len(tokens) for tokens in inputs]
        chosen = torch.cat([hidden[i, ends[i] - row.scored : ends[i]] for i, row in flat])
        targets = [token for _, row in flat for token in row.tokens[-row.scored :]]
        likelihoods, likeliest = self._likelihoods(chosen, torch.tensor(targets).to(self._where))
        lengths = [row.scored for _, row in flat]
        pairs = zip(likelihoods.split(lengths), likeliest.split(lengths), strict=True)
        return [(float(sums.double().sum()), bool(best.all())) for sums, best in pairs]

    def _likelihoods(
        self, hidden: Float[Tensor, "n c"], targets: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Return the log-likelihood of each target, and True if it is the likeliest token."""
        likelihoods, likeliest = [], []
        step = max(1, LOGITS_AT_ONCE // self.model.spec.vocab_size)
        for part, wanted in zip(hidden.split(step), targets.split(step), strict=True):
            with self._autocast():
                logits = self.model.lm_head(part)
            logits = logits.float()
            value = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
            likelihoods.append(value.cpu())
            likeliest.append((logits.argmax(-1) == wanted).cpu())
        return torch.cat(likelihoods), torch.cat(likeliest)

    def _continue(
        self, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        with progress_bar("answering", len(prompts), " texts", shown=self._shown) as bar:
            for start in range(0, len(order), self.batch_size):
                members = order[start : start + self.batch_size]
                batch = [prompts[i] for i in members]
                for i, tokens in zip(
                    members, self._continue_batch(batch, new_tokens, until), strict=True
                ):
                    answers[i] = tokens
                bar.update(len(members))
        return answers

    @torch.no_grad()
    def _continue_batch(
        self, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[list[int]]:
        """Generate for all prompts in step; longer prompts are read on while others generate."""
        position = min(map(len, prompts))
        answers: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        cache = self.model.empty_cache(len(prompts))
        step = [prompt[:position] for prompt in prompts]
        while live:
            with self._autocast():
                hidden = self.model.hidden(torch.tensor(step, device=self._where), cache)
                chosen = self.model.lm_head(hidden[:, -1]).argmax(-1).tolist()
            kept, step = [], []
            for i, row in enumerate(live):
                prompt, answer = prompts[row], answers[row]
                if position < len(prompt):
                    kept.append(i)
                    step.append([prompt[position]])
                    continue
                answer.append(chosen[i])
                if len(answer) < new_tokens and not self._tokenizer.tail_stops(answer, until):
                    kept.append(i)
                    step.append([chosen[i]])
            if len(kept) < len(live):
                live = [live[i] for i in kept]
                cache = [LayerCache(layer.keys[kept], layer.values[kept]) for layer in cache]
            position += 1
        return answers


class ProgramLM(TextLM):
    """Adapter of a .pte in its runtime, with many requests to a process.

    The program returns logits for the last token of a call only, so the tokens of a continuation
    are processed one at a time, as in generation.

    Args:
        device: Device that runs the program.
        program: Path of the .pte.
        tokenizer: Tokenizer of the model.
        kinds: Attention kinds of its layers.
        context: Context that the program was exported with [tokens].
    """

    def __init__(
        self,
        device: Device,
        program: Path,
        tokenizer: HarnessTokenizer,
        kinds: Sequence[Attention],
        context: int,
    ) -> None:
        super().__init__(tokenizer, context)
        self._runtime, self._program = device, program
        # The cache of a sliding layer no longer holds the prefix shared with the previous text.
        self._reuse = Attention.sliding_attention not in kinds

    def _score(self, rows: list[TokenRow]) -> list[tuple[float, bool]]:
        # Adjacent rows then share the longest prefixes.
        order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with progress_bar("scoring", len(rows), " texts") as bar:
            for start in range(0, len(order), TEXTS_A_PROCESS):
                members = order[start : start + TEXTS_A_PROCESS]
                asked = [(rows[i].tokens, len(rows[i].tokens) - rows[i].scored) for i in members]
                found = self._runtime.score_many(self._program, asked, reuse=self._reuse)
                for i, (tokens, prefill), scores in zip(members, asked, found, strict=True):
                    greedy = scores["choices"] == list(tokens[prefill:])
                    answers[i] = (sum(scores["log_likelihoods"]), greedy)
                bar.update(len(members))
        return answers

    def _continue(
        self, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: prompts[i])
        with progress_bar("answering", len(prompts), " texts") as bar:
            for start in range(0, len(order), TEXTS_A_PROCESS):
                members = order[start : start + TEXTS_A_PROCESS]
                found = self._continue_some([prompts[i] for i in members], new_tokens, until)
                for i, tokens in zip(members, found, strict=True):
                    answers[i] = tokens
                bar.update(len(members))
        return answers

    def _continue_some(
        self, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[list[int]]:
        """Generate on the device, which knows tokens but not text.

        The device stops at tokens that contain a whole stop string. Stop strings of several tokens
        are searched for here, after rounds of growing length.
        """
        stop = {*self._tokenizer.end_ids, *self._tokenizer.containing(until)}
        rounds = any(len(string) > 1 for string in until)
        size = min(FIRST_ROUND, new_tokens) if rounds else new_tokens
        answers: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        while live and size > 0:
            texts = [prompts[i] + answers[i] for i in live]
            found = self._runtime.generate_many(
                self._program, texts, size, sorted(stop), reuse=self._reuse
            )
            for i, tokens in zip(live, found, strict=True):
                answers[i] += tokens
            live = [i for i in live if not self._stopped(answers[i], stop, until)]
            done = max(map(len, answers))  # of all unfinished answers
            size = min(done, new_tokens - done)
        return answers

    def _stopped(self, answer: list[int], stop: set[int], until: list[str]) -> bool:
        if answer[-1] in stop:
            return True
        text = self._tokenizer.backend.decode(answer, skip_special_tokens=False)
        return any(string in text for string in until)
