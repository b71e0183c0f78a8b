"""Tool use of Llama 3.1 and later: tool definitions and calls -> prompt text.

Knows nothing about token ids. `llama.text.tool_parser` parses a model's answer.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

ToolForm = Literal["json", "function_tag", "python_list"]
TOOL_FORMS: tuple[str, ...] = get_args(ToolForm)
# Tools that the models were trained to call without a definition.
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen", "code_interpreter")

# A JSON-schema definition, also inside {"type": "function", "function": ...}, or a built-in's name.
Tool = Mapping[str, Any] | str


class ToolCall(TypedDict):
    """A model's request to run a tool. The arguments have JSON types."""

    name: str
    arguments: dict[str, Any]


MAX_DEPTH = 32  # nesting of lists and objects in a call's arguments
_MAX_BITS = 2048  # of an integer; Python limits the conversion of longer ones to decimal
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_call(call: Mapping[str, Any]) -> None:
    """Check that a call is a name and a dict of arguments with JSON types.

    Raises:
        TypeError: a part has another type.
        ValueError: an invalid name (`__import__`) or number (NaN), or too deep nesting.
    """
    if not isinstance(call, Mapping) or set(call) != {"name", "arguments"}:
        raise TypeError(f"a tool call is {{'name': ..., 'arguments': {{...}}}}, not {call!r:.200}")
    name, arguments = call["name"], call["arguments"]
    _check_name(name)
    if not isinstance(arguments, dict):
        raise TypeError(f"the arguments of {name} are an object (a dict), not {arguments!r:.200}")
    _check_data(arguments, MAX_DEPTH)
    if hidden := [key for key in arguments if key.startswith("__")]:
        raise ValueError(f"{hidden[0]!r:.80} is not the name of an argument")


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a tool's name is a str, not {name!r:.200}")
    if not _NAME.fullmatch(name) or any(part.startswith("__") for part in name.split(".")):
        raise ValueError(
            f"{name!r:.80} is not a tool's name: use up to 64 letters, digits, '_', '-' and '.', "
            "and no leading '__'"
        )


def _check_data(value: object, depth: int) -> None:
    """Check that `value` has JSON types and survives a round trip through JSON."""
    if depth < 0:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"keys must be text, not {strange[0]!r:.80}")
        for item in value.values():
            _check_data(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_data(item, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError("a number of over 600 digits")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(f"{type(value).__name__} is not one of JSON's types")


def check_tools(tools: Sequence[Tool], form: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Check `tools`; return the names of built-in ones, and the definitions without wrappers."""
    check_form(form)
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError("tools are a list of definitions and names of Meta's built-in tools")
    builtin: list[str] = []
    functions: list[dict[str, Any]] = []
    for tool in tools:
        if isinstance(tool, str):
            if tool not in BUILTIN_TOOLS:
                raise ValueError(f"no built-in tool {tool!r}; define it, or use {BUILTIN_TOOLS}")
            builtin.append(tool)
        else:
            functions.append(_check_definition(tool, form))
    names = [*builtin, *(function["name"] for function in functions)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"tools named twice: {sorted(repeated)}")
    return builtin, functions


def check_form(form: str) -> None:
    """Raise a ValueError unless `form` is a `ToolForm`."""
    if form not in TOOL_FORMS:
        raise ValueError(f"unknown tool_form {form!r}; use one of {list(TOOL_FORMS)}")


def _check_definition(tool: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Check a definition; return it without a wrapper."""
    if not isinstance(tool, Mapping):
        raise TypeError(f"a tool is a dict or the name of a built-in one, not {type(tool)}")
    function = dict(tool)
    if "function" in tool:
        function = tool["function"]
        if tool.get("type") != "function" or len(tool) > 2 or not isinstance(function, dict):
            raise ValueError('a wrapped tool is {"type": "function", "function": {...}}')
    if set(function) != {"name", "description", "parameters"}:
        raise ValueError(
            f"a tool has a name, a description and parameters only, not {sorted(function)}"
        )
    name, parameters = function["name"], function["parameters"]
    _check_name(name)
    if name in BUILTIN_TOOLS:
        raise ValueError(f"{name} is a built-in tool: give its name alone, or choose another name")
    if not isinstance(function["description"], str):
        raise TypeError(f"the description of {name} is a str")
    _check_data(function, MAX_DEPTH)
    kinds = ("object", "dict")  # of JSON schema, and of Meta's examples for 3.2
    if not isinstance(parameters, dict) or parameters.get("type") not in kinds:
        raise ValueError(f'parameters of {name} are {{"type": "object", "properties": {{...}}}}')
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError(f"parameters of {name}: properties are an object, required is a list")
    if unknown := [key for key in required if key not in list(properties)]:
        raise ValueError(f"{name} requires {unknown}, which its properties lack")
    odd = [word for word in (*name.split("."), *properties) if not is_identifier(word)]
    if odd and form == "python_list":
        raise ValueError(f"{odd} cannot be written in Python; rename, or use another tool_form")
    return function


def with_tools(
    dialog: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: str = "json"
) -> list[Mapping[str, Any]]:
    """The dialog with the tools added, in the places that Meta documents.

    The system message (a new one if there is none) starts with `Environment: ipython` and the
    built-in tools. Definitions follow in a user message of their own (json and function_tag, as
    for 3.1) or in the system message before its own text (python_list, as for 3.2 and 3.3).
    """
    builtin, functions = check_tools(tools, form)
    head = []
    if builtin or form != "python_list":
        head.append("Environment: ipython")
    if searching := [name for name in builtin if name != "code_interpreter"]:
        head.append(f"Tools: {', '.join(searching)}")
    parts = ["\n".join(head)]
    rest, described = list(dialog), describe_tools(functions, form) if functions else ""
    if form == "python_list":
        parts.append(described)
    if rest and rest[0]["role"] == "system":
        parts.append(rest.pop(0)["content"].strip())
    if functions and form != "python_list":
        rest.insert(0, {"role": "user", "content": described})
    return [{"role": "system", "content": "\n\n".join(filter(None, parts))}, *rest]


def describe_tools(functions: Sequence[Mapping[str, Any]], form: str) -> str:
    """The prompt text with the definitions, as Meta documents it for `form`."""
    if form == "json":
        listed = "\n".join(_dump({"type": "function", "function": f}, 4) for f in functions)
        return (
            "Answer the user's question by making use of the following functions if needed.\n"
            "If none of the function can be used, please say so.\n"
            f"Here is a list of functions in JSON format:\n{listed}\n\n"
            "Return function calls in JSON format."
        )
    if form == "function_tag":
        listed = "\n\n".join(
            f"Use the function '{f['name']}' to '{f['description']}':\n{_dump(f)}"
            for f in functions
        )
        return (
            f"You have access to the following functions:\n\n{listed}\n\n"
            "Think very carefully before calling functions.\n"
            "If you choose to call a function ONLY reply in the following format with no prefix "
            'or suffix:\n\n<function=example_function_name>{"example_name": "example_value"}'
            "</function>\n\nReminder:\n"
            "- If looking for real time information use relevant functions before falling back to "
            "brave_search\n"
            "- Function calls MUST follow the specified format, start with <function= and end with "
            "</function>\n- Required parameters MUST be specified\n"
            "- Only call one function at a time\n- Put the entire function call reply on one line"
        )
    return (
        "You are an expert in composing functions. You are given a question and a set of possible "
        "functions.\nBased on the question, you will need to make one or more function/tool calls "
        "to achieve the purpose.\nIf none of the function can be used, point it out. If the given "
        "question lacks the parameters required by the function,\nalso point it out. You should "
        "only return the function call in tools call sections.\n\nIf you decide to invoke any of "
        "the function(s), you MUST put it in the format of [func_name1(params_name1=params_value1, "
        "params_name2=params_value2...), func_name2(params)]\nYou SHOULD NOT include any other "
        "text in the response.\n\nHere is a list of functions in JSON format that you can invoke."
        f"\n\n{_dump(list(functions), 4)}"
    )


def _dump(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def encode_tool_call(call: ToolCall, form: str = "json") -> str:
    """The text of a call, as the model would write it; after Meta's `ToolUtils.encode_tool_call`.

    Calls of built-in tools have a form of their own. With python_list, a call that is not valid
    Python (an argument named "a-b") is written as JSON. Unlike Meta's, every text can be parsed:
    quotes, backslashes and line breaks are escaped, dicts in Python are {"key": value}, and
    built-in calls with other arguments than Meta's have the general form.

    Raises:
        TypeError, ValueError: `call` is not a call (see `check_call`), or the form is unknown.
    """
    check_call(call)
    name, arguments = call["name"], call["arguments"]
    if is_code(call):
        return str(arguments["code"])
    query = arguments.get("query")
    if name in BUILTIN_TOOLS and list(arguments) == ["query"] and isinstance(query, str):
        # Only backslashes before a quote are escaped; others stay (LaTeX).
        escaped = re.sub(r'(?<!\\)(\\*)("|\Z)', lambda m: m[1] * 2 + (m[2] and r"\""), query)
        return f'{name}.call(query="{escaped}")'
    return _general_form(call, form)


def encode_tool_calls(calls: Sequence[ToolCall], form: str = "json") -> list[str]:
    """The texts of one message's calls; the prompt contains them one after the other.

    Several calls all have the general form (in Python, one list), so that they can be parsed.
    """
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise TypeError("tool_calls are a list of {'name': ..., 'arguments': {...}}")
    check_form(form)
    if len(calls) == 1:
        return [encode_tool_call(calls[0], form)]
    for call in calls:
        check_call(call)
    if form == "python_list" and all(map(_is_valid_python, calls)) and calls:
        return [f"[{', '.join(map(_python_call, calls))}]"]
    return [_general_form(call, "json" if form == "python_list" else form) for call in calls]


def is_code(call: ToolCall) -> bool:
    """Whether a call is code, which follows `<|python_tag|>` in the prompt."""
    arguments = call["arguments"]
    return (
        call["name"] == "code_interpreter"
        and list(arguments) == ["code"]
        and isinstance(arguments["code"], str)
    )


def _general_form(call: ToolCall, form: str) -> str:
    """A call in `form`, also of a built-in tool."""
    check_form(form)
    name, arguments = call["name"], call["arguments"]
    if form == "function_tag":
        return f"<function={name}>{json.dumps(arguments)}</function>"
    if form == "python_list" and _is_valid_python(call):
        return f"[{_python_call(call)}]"
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def is_identifier(word: str) -> bool:
    return word.isascii() and word.isidentifier() and not keyword.iskeyword(word)


def _is_valid_python(call: ToolCall) -> bool:
    return all(map(is_identifier, (*call["name"].split("."), *call["arguments"])))


def _python_call(call: ToolCall) -> str:
    arguments = (f"{key}={_python(value)}" for key, value in call["arguments"].items())
    return f"{call['name']}({', '.join(arguments)})"


def _python(value: object) -> str:
    """A JSON value as a Python literal."""
    if isinstance(value, str):  # JSON's escapes are valid in Python; Meta's texts have " as quote
        return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", _dump(value))
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_python(k)}: {_python(v)}' for k, v in value.items())}}}"
    return str(value)
