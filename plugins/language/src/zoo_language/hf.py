"""The zoo's language models inside transformers: ``wrap(model).generate`` with its logits processors, streamers, beams.

Needs the extra ``transformers`` (``pip install 'ssm-zoo-language[transformers]'``). What transformers calls a cache is
here a :class:`zoo_language.state.State`: it comes back as ``outputs.state`` and goes in as ``state=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ._base import CausalLM
from .decode import decoder_for
from .state import State


class ZooConfig(PreTrainedConfig):
    """What transformers asks of a configuration; the model itself is built by the zoo."""

    model_type = "zoo"


@dataclass
class CausalLMOutput(ModelOutput):
    """``logits`` (batch, length, vocabulary); ``loss`` where labels were given; ``state`` where one is kept."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class ZooForCausalLM(PreTrainedModel, GenerationMixin):
    """A zoo model as transformers' generation loop sees it. Made by :func:`wrap`.

    Prompts of a batch may be left-padded (``attention_mask`` 0 there), as transformers' tokenizers do for decoder-only
    models; padding never enters the state. Beams reorder the state's rows. Assisted generation needs to take tokens
    back, which transformers does not do with states.
    """

    config_class = ZooConfig
    base_model_prefix = "zoo"
    main_input_name = "input_ids"
    _is_stateful = True
    _keys_to_ignore_on_save = None

    def __init__(self, config: ZooConfig, model: CausalLM) -> None:
        super().__init__(config)
        self.zoo = model

    @property
    def device(self) -> torch.device:
        return self.zoo.device

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @staticmethod
    def _reorder_cache(state: State, beam_idx: Tensor) -> State:
        return state.select(beam_idx)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None,
        use_cache: bool | None = True, is_first_iteration: bool | None = False, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if not use_cache:
            return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if is_first_iteration:  # a state that the caller holds stays as it is
            state = None if state is None else state.fork()
        else:
            input_ids, attention_mask = input_ids[:, -1:], None
        return {"input_ids": input_ids, "attention_mask": attention_mask, "state": state, "use_cache": True}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutput | tuple:
        """Logits; with ``use_cache`` or a ``state`` also the state after the ids, which is moved on in place.

        labels: (batch, length), shifted inside, -100 where nothing is to be predicted; padding predicts nothing either.
        """
        batch, length = input_ids.shape
        model = self.zoo
        if state is None and use_cache:
            state = model.init_state(batch)
        if state is not None and length > 1 and batch == 1:
            decoder_for(model)  # the steps that follow do not look whether weights were written through .data
        if state is not None and length == 1 and attention_mask is None and not torch.is_grad_enabled():
            fast = decoder_for(model, watch=False) if batch == 1 else None
            step = model.step(input_ids[:, 0], state) if fast is None else fast.step(input_ids[0, 0], state)
            logits = step[:, None]
        elif attention_mask is None or bool(attention_mask[:, -length:].all()):
            logits = model(input_ids, state=state)
        else:
            logits = self._padded(input_ids, attention_mask[:, -length:], state)
        logits = logits[..., : model.vocab_size].float()
        loss = None
        if labels is not None:
            wanted = labels[:, 1:]
            if attention_mask is not None:  # nothing that was read predicts the first token behind padding
                wanted = wanted.masked_fill(attention_mask[:, -length:][:, :-1] == 0, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        out = CausalLMOutput(loss=loss, logits=logits, state=state)
        return out if return_dict is not False else out.to_tuple()

    def _padded(self, input_ids: Tensor, mask: Tensor, state: State | None) -> Tensor:
        """Move each text to the left edge, where padding behind it is left out, and its logits back."""
        keep = mask.bool()
        lengths = keep.sum(1)
        if bool((lengths == 0).any()):
            raise ValueError(f"row {int((lengths == 0).nonzero()[0])} of attention_mask is all 0; give a token a text")
        first = keep.int().argmax(1)
        steps = torch.arange(mask.shape[1], device=mask.device)
        if not bool((keep == ((steps >= first[:, None]) & (steps < (first + lengths)[:, None]))).all()):
            raise ValueError("attention_mask has holes; the tokens of a text must be contiguous, padding around them")
        source = (steps + first[:, None]) % mask.shape[1]
        logits = self.zoo(input_ids.gather(1, source), state=state, lengths=lengths)
        back = (steps - first[:, None]) % mask.shape[1]
        return logits.gather(1, back[..., None].expand_as(logits))


def wrap(model: CausalLM, **generation: Any) -> ZooForCausalLM:
    """``model`` with transformers' ``generate``. generation: fields of its GenerationConfig (``eos_token_id`` ...).

    Example::

        hf = wrap(zoo.load("mamba_130m"), eos_token_id=0, pad_token_id=0)
        hf.generate(ids, max_new_tokens=20, do_sample=True, streamer=streamer)
    """
    if not isinstance(model, CausalLM):
        raise ValueError(f"a {type(model).__name__} is no language model of the zoo; expected what zoo.load gives")
    vocabulary = model.vocab_size
    config = ZooConfig(vocab_size=vocabulary, is_encoder_decoder=False, tie_word_embeddings=False)
    wrapped = ZooForCausalLM(config, model)
    wrapped.generation_config = GenerationConfig(**generation)
    return wrapped.eval() if not model.training else wrapped
