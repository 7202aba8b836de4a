"""Chat templates in the ways that models have them, written for these tests."""

from __future__ import annotations

IM = "<|im_start|>"
END = "<|im_end|>"

# A turn is closed by a token, spaces stand around the answer, roles must alternate, no system role.
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' <|im_end|>' }}{% endif %}{% endfor %}"
)

# As models that think have it: an earlier answer loses its thinking, the last one gets an empty block.
THINKING = (
    "{% for m in messages %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set words = parts[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Adds an end-of-text token where no answer is asked for, passes over system and tool turns.
PHI = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)

# The answer is followed by the next turn's mark only.
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Asks for an answer in another way than it renders one.
OTHER_ASK = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# The system turn moves to the last user turn, so that earlier prompts are not what the row begins with.
SYSTEM_LAST = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}"
    "{% if m['role'] == 'user' and system and not later %}"
    "{{ system + '\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Writes the beginning-of-sequence token twice.
TWO_BOS = "{{ '<|im_start|><|im_start|>' }}" + NO_END.replace("m['content'] + '\n'", "m['content'] + '<|im_end|>\n'")


def chat(*turns: str, system: str | None = None) -> dict[str, list[dict[str, str]]]:
    """A row: user and assistant turns in alternation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}
