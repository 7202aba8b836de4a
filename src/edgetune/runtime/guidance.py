"""Constraints: answers that fit a JSON Schema, a regular expression or a grammar.

An answer that ends by itself fits, or is an error. One that is cut, at its limit or by who asked, does not fit, and says so:
`Completion.fits` and `finish_reason`.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.options import GenerationOptions

# JSON as json.dumps writes it. Without this, small models put in white space until the tokens run out.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_GRAMMAR = '{"type": "edgetune"}'  # no JSON Schema: a build that knows guidance refuses it
_NATIVE = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark_grammar"}
_WORDS = {"json_schema": "JSON Schema", "regex": "regular expression", "grammar": "grammar"}
_MOST_ITEMS = 10_000  # of an array: guidance writes each out, and would fill the memory with a thousand million
_VALUES = ("const", "default", "enum", "examples")  # keywords that hold data, not schemas
_OTHER_DIALECT = re.compile(r"\[\[|&&|~~|--|\\[pPzA<>bBQK]|\(\?[a-zA-Z]*[uRx]")  # where Rust's and Python's differ


def constraints(options: GenerationOptions) -> dict[str, Any]:
    """What the options say of each kind of constraint, None where nothing; at most one is given."""
    return {kind: getattr(options, kind) for kind in _NATIVE}


class Guide:
    """One constraint.

    Args:
        kind: the option that it was given by: json_schema, regex or grammar.
        data: what that option says, as text.

    Attributes:
        key: tells constraints apart.
    """

    def __init__(self, kind: str, data: str) -> None:
        self.kind, self._data = kind, data
        self.key = (kind, data)

    @classmethod
    def of(cls, options: GenerationOptions) -> Guide | None:
        """The constraint that is asked for, if any. Raises InputError where it asks for more than can be counted."""
        for kind, data in constraints(options).items():
            if data is not None and kind == "json_schema":
                _require_countable(data)
                return cls(kind, json.dumps({**data, "x-guidance": _JSON_STYLE}))
            if data is not None:
                return cls(kind, data)
        return None

    def generator(self, og: Any, model: Any, params: Any) -> Any:
        """A native generator whose answers fit. Raises InputError where that cannot be done."""
        try:
            params.set_guidance(_NATIVE[self.kind], self._data)
            return og.Generator(model, params)
        except RuntimeError as error:
            raise InputError(
                f"the {_WORDS[self.kind].removeprefix('JSON ').lower()} cannot be followed: {' '.join(str(error).split())[:300]}",
                where=self.kind,
                fix="check it; not every JSON Schema keyword is supported"
                if self.kind == "json_schema"
                else "check it; regular expressions are those of Rust's regex, grammars those of llguidance (Lark)",
            ) from error

    def cure(self, error: str) -> str:
        """What to do when the native side breaks off in the middle of an answer, with this error."""
        if re.search(r"\btoo (many|big|large|long)\b", error, re.IGNORECASE):
            return f"make the {_WORDS[self.kind]} simpler: fewer repetitions, no rule that begins with itself"
        where = "JSON Schema's const, enum and pattern" if self.kind == "json_schema" else _WORDS[self.kind]
        return f"leave emoji and other characters of several tokens out of the {where}"

    def check(self, text: str, data: bytes, artifact: Artifact) -> None:
        """Look once more at a finished answer: the native side does not see inside characters of several tokens, and lets
        broken ones pass, which are left out of the text. What is whole is as the native side found it; JSON and most
        regular expressions are read a second time here, grammars are not.

        Args:
            text: the answer.
            data: the bytes of its tokens.
            artifact: for messages.

        Raises:
            EdgetuneError: it does not fit.
        """
        try:
            whole = "\0" not in data.decode()  # the native side takes that for a text's end
        except UnicodeDecodeError:
            whole = False
        if not whole:
            raise _broken(f"so the answer does not fit the {_WORDS[self.kind]}", artifact)
        if self.kind == "json_schema":
            from edgetune.runtime.json_schema import misfit

            try:
                found = misfit(json.loads(text), json.loads(self._data))
            except (json.JSONDecodeError, RecursionError) as error:
                raise _broken(f"so its JSON is not whole ({error})", artifact) from error
            if found:
                raise _broken(f"so the answer does not fit the schema: {found}", artifact)
        elif self.kind == "regex" and not _OTHER_DIALECT.search(self._data):
            with contextlib.suppress(re.error):
                if not re.fullmatch(self._data, text):
                    raise _broken("so the answer does not fit the regular expression", artifact)


def _require_countable(schema: Any) -> None:
    """Raise InputError where a schema counts the items of an array beyond `_MOST_ITEMS`."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            for key in ("minItems", "maxItems"):
                if isinstance(one.get(key), (int, float)) and one[key] > _MOST_ITEMS:
                    raise InputError(
                        f"{key} is {one[key]:,}; items are counted up to {_MOST_ITEMS:,}",
                        where="json_schema",
                        fix="leave it out, or ask for fewer",
                    )
            waiting += [value for key, value in one.items() if key not in _VALUES]


def require_guidance(og: Any, model: Any) -> None:
    """Raises EdgetuneError where this build of onnxruntime-genai has no guidance: it would only log that, and answer as
    it likes."""
    probe = og.GeneratorParams(model)
    probe.set_search_options(max_length=2)
    with contextlib.suppress(RuntimeError):
        probe.set_guidance("json_schema", _NO_GRAMMAR)
        og.Generator(model, probe)
        raise EdgetuneError(
            "this build of onnxruntime-genai cannot follow a JSON Schema, regular expression or grammar",
            fix="`pip install --force-reinstall onnxruntime-genai`, or no constraint",
        )


def _broken(what: str, artifact: Artifact) -> EdgetuneError:
    return EdgetuneError(
        f"the model wrote a broken character, {what}",
        where=artifact.path,
        fix="ask again, with a lower temperature or another seed",
    )
