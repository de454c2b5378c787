"""How a conversation becomes one text: InternVL's template of InternLM2, and a plain one for small models.

Source: hustvl/mmMamba @ 85143d0, MIT (``hovle/conversation.py`` "internlm2-chat", ``hovle/modeling_internvl_chat.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"  #: where a picture belongs, in what a user writes
START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Template:
    """``system`` is left out where it is empty; every message ends in ``end``, which also ends an answer."""

    system: str
    system_role: str
    user_role: str
    answer_role: str
    end: str = "<|im_end|>"

    def text(self, question: str, history: Sequence[tuple[str, str]] = (), system: str | None = None) -> str:
        """The text that the model continues with its answer. ``history``: earlier (question, answer) pairs."""
        said = self.system if system is None else system
        found = f"{self.system_role}{said}{self.end}" if said else ""
        for asked, answered in history:
            found += f"{self.user_role}{asked}{self.end}{self.answer_role}{answered}{self.end}"
        return f"{found}{self.user_role}{question}{self.end}{self.answer_role}"


TEMPLATES = {
    "internlm2-chat": Template(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n",
    ),
    "plain": Template("", "", "", ""),
}  # fmt: skip


def template_of(name: str) -> Template:
    """Raises ValueError for another name than those of :data:`TEMPLATES`."""
    if name not in TEMPLATES:
        raise ValueError(f"template is {name!r}; expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def with_pictures(text: str, tiles: Sequence[int], tokens_per_tile: int) -> str:
    """Put the marks of pictures into a text: for the i-th :data:`IMAGE`, ``tiles[i]`` tiles' places between <img> and
    </img>. Raises ValueError where there are more or fewer pictures than places."""
    if text.count(IMAGE) != len(tiles):
        raise ValueError(f"the text has {text.count(IMAGE)} places {IMAGE!r}, but {len(tiles)} pictures were given")
    for count in tiles:
        text = text.replace(IMAGE, START + CONTEXT * tokens_per_tile * count + END, 1)
    return text


def ask(question: str, pictures: int) -> str:
    """A question with its pictures in front, unless it says itself where they belong."""
    return question if IMAGE in question or not pictures else f"{IMAGE}\n" * pictures + question
