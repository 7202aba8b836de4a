"""What an artifact carries for others: catalogs' inference_model.json, and a folder that plain onnxruntime-genai loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from artifacts import tiny_artifact  # noqa: F401 - a fixture
from conftest import CHATML
from edgetune.export.contract import _prompt_template

_PLAIN = """
import json, sys
sys.modules["edgetune"] = None
import onnxruntime_genai as og
folder = sys.argv[1]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
prompt = json.load(open(folder + "/golden.json", encoding="utf-8"))["prompts"][0]
text = tokenizer.apply_chat_template(json.dumps(prompt["messages"]), add_generation_prompt=True)
assert text == prompt["text"], text
ids = tokenizer.encode(text)
assert [int(i) for i in ids] == prompt["ids"]
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 4)
generator = og.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print("made", len(generator.get_sequence(0)) - len(ids))
"""


def test_the_artifact_loads_in_plain_onnxruntime_genai(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(tiny_artifact)],
        cwd=tmp_path,
        env={"PATH": "", "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout.split("made ")[1]) <= 4


class _Template:
    """A tokenizer that has nothing but a template."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        from jinja2 import Environment, TemplateError

        def refuse(message: str) -> None:
            raise TemplateError(message)

        values = {"messages": messages, "add_generation_prompt": add_generation_prompt, "raise_exception": refuse}
        return Environment().from_string(self.template).render(values)


def test_catalogs_find_each_turn() -> None:
    head = "<|im_start|>system\nYou help.<|im_end|>\n"
    assert _prompt_template(_Template(CHATML)) == {
        "prompt": head + "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|im_start|>system\n{Content}<|im_end|>\n",
        "user": "<|im_start|>user\n{Content}<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n{Content}<|im_end|>\n",
    }


def test_a_turn_that_the_template_refuses_is_left_out() -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert _prompt_template(_Template(strict)) == {
        "prompt": "[user]{Content}[assistant]",
        "assistant": "[assistant]{Content}",
    }
