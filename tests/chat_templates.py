"""Chat templates of model families, cut down to how they show tools, calls and reasoning."""

from __future__ import annotations

from typing import Any

from test_encoding import CHATML, byte_level

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CALLED = '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
_HERMES_TOOLS = (
    "# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    'For each call return <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
)
_HERMES_SYSTEM = "{% if tools %}<|im_start|>system\n" + _HERMES_TOOLS + "<|im_end|>\n{% endif %}"

TEMPLATES = {
    "qwen": _HERMES_SYSTEM + "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}" + _TURN + "{% for call in m.tool_calls or [] %}{% set c = call.function %}\n"
    "<tool_call>\n"
    + _CALLED
    + "\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    + _ANSWER.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
    # Leaves calls out, and writes their results as a user's messages.
    "smollm3": _HERMES_SYSTEM.replace("tools %}", "xml_tools %}")
    + "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _ANSWER,
    "llama": "{{ bos_token }}{% if tools %}Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.\n'
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}<|im_start|>assistant\n"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}<|im_end|>\n'
    "{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content }}<|im_end|>\n"
    "{% else %}" + _TURN + "<|im_end|>\n{% endif %}{% endfor %}" + _ANSWER,
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    '{% endif %}{{ call.function | tojson }}, "id": "{{ call.id }}"{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    '{% endif %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": '
    '"{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}'
    "{% endfor %}",
    "mistral-named": "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}[TOOL_CALLS]"
    "{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = "
    "messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "granite": "{% if tools %}<|im_start|>tools\nRespond only with <|tool_call|> followed by a "
    "JSON list of tools used.\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<|tool_call|>"
    "{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _ANSWER,
    "smollm2": CHATML,
    # Calls are XML, of which the grammar is not known.
    "qwen-coder": "{% if tools %}{{ tools | tojson }}<tool_call>\n<function=name>\n{% endif %}"
    + CHATML,
}


def with_template(template: str, *special: str) -> Any:
    """A byte-level tokenizer with a chat template and special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer
