"""Chat templates that refuse what others take, and one that thinks."""

from __future__ import annotations

from rapid_llm.decoder import RapidDecoder
from tiny import tiny_model, tiny_tokenizer

_REFUSE_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
_SYSTEM_FIRST = (
    "{% set rest = messages %}{% if messages and messages[0]['role'] == 'system' %}"
    "[system]{{ messages[0]['content'] }}\n{% set rest = messages[1:] %}{% endif %}"
)
_ALTERNATING = (
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALTERNATING = "<s>" + _SYSTEM_FIRST + _ALTERNATING
NO_SYSTEM = "<s>" + _REFUSE_SYSTEM + "{% set rest = messages %}" + _ALTERNATING

THINKING = (
    "<s>{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}()"
    "{% elif style is defined %}{{ style }}{% endif %}{% endif %}"
)


def decoder_with(template: str) -> RapidDecoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return RapidDecoder(tiny_model(), tokenizer, name="strict")
