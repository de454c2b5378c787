"""The zoo's language models as a model of lm-evaluation-harness (EleutherAI, package ``lm-eval``).

    import lm_eval
    from zoo_language.lm_eval_adapter import ZooLM
    lm_eval.simple_evaluate(model=ZooLM("mamba_130m"), tasks=["lambada_openai"])

Needs the extra ``lm-eval`` (``pip install 'ssm-zoo-language[lm-eval]'``). Contexts are read once: requests that share a
context go on from a fork of its state, so that the choices of a question cost only their own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ._base import CausalLM
from .generation import Sampling, generate
from .pipelines import TextGeneration
from .scoring import score
from .state import State


class ZooLM(LM):
    """``model``: a name that ``zoo.load`` knows, a loaded model, or a text-generation pipeline.

    tokenizer: see :class:`TextGeneration`. max_gen_toks: tokens of an answer where a task gives no limit.
    """

    def __init__(
        self, model: str | CausalLM | TextGeneration, tokenizer: Any = None, max_gen_toks: int = 256, **load: Any
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            import zoo

            model = zoo.load(model, **load)
        pipe = model if isinstance(model, TextGeneration) else TextGeneration(model, tokenizer=tokenizer)
        self.lm, self.tokens, self.max_gen_toks = pipe.lm, pipe.tokenizer, max_gen_toks
        self._start = pipe.start

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokens).__name__

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both; trailing spaces of the context belong to the continuation, as the harness has it."""
        if not context:
            return self._start, self.tokens.encode(continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        given = self.tokens.encode(context)
        return given or self._start, self.tokens.encode(context + continuation)[len(given) :]

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each continuation after its context."""
        states: dict[tuple[int, ...], State] = {}
        answers = []
        pairs = [self._pair(*request.args) for request in requests]
        left: dict[tuple[int, ...], int] = {}
        for given, _ in pairs:
            left[tuple(given)] = left.get(tuple(given), 0) + 1
        for given, wanted in pairs:
            key = tuple(given)
            state = states.get(key)
            if state is None:
                state = states[key] = self.lm.prefill(torch.tensor([given], device=self.lm.device))
            left[key] -= 1
            if not left[key]:
                del states[key]
            answers.append(self._continue(state, wanted))
        return answers

    def _continue(self, state: State, wanted: Sequence[int]) -> tuple[float, bool]:
        if not wanted:
            return 0.0, True
        assert state.logits is not None
        logits = [state.logits]
        if len(wanted) > 1:
            ids = torch.tensor([list(wanted[:-1])], device=self.lm.device)
            logits.append(self.lm(ids, state=state.fork())[0])
        rows = torch.cat(logits)[:, : self.lm.vocab_size].float()
        target = torch.tensor(list(wanted), device=rows.device)
        chosen = rows.log_softmax(-1).gather(1, target[:, None])
        return float(chosen.sum()), bool((rows.argmax(-1) == target).all())

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability in nats of whole texts, however long: the state is carried from window to window."""
        answers = []
        for request in requests:
            ids = self._start + self.tokens.encode(request.args[0])
            answers.append(-score(self.lm, ids, text_bytes=0).nats if len(ids) > 1 else 0.0)
        return answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to a stop string (left out) or the limit of tokens."""
        answers = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or ()
            sample = bool(options.get("do_sample"))
            texts, _ = generate(
                self.lm,
                [self.tokens.encode(context) or self._start],
                max_new_tokens=int(options.get("max_gen_toks", self.max_gen_toks)),
                sampling=Sampling(
                    temperature=float(options.get("temperature", 1.0)) if sample else 0.0,
                    top_k=int(options.get("top_k", 0)),
                    top_p=float(options.get("top_p", 1.0)),
                ),
                stop_tokens=() if self.tokens.end_of_text is None else (self.tokens.end_of_text,),
                stop_strings=(until,) if isinstance(until, str) and until else tuple(filter(None, until)),
                decode=self.tokens.decode,
            )
            answers.append(texts[0].text or "")
        return answers
