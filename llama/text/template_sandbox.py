"""Renders Jinja templates as transformers does, within limits. Knows nothing about messages.

A template comes from a checkpoint and may be hostile. jinja2's sandbox keeps it from Python's
internals. `Meter` limits its work and memory: each value that a template makes or reads as a whole
costs its size, and each turn of a loop costs the text in it. What can make a large value from small
ones (`*`, `replace`, ...) is checked before it runs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llama.text.template_meter import Meter, Namespace, TooMuchError, measure

MAX_SOURCE = 200_000  # characters of a template

# Filters that make a small value, or are checked below. Others are unknown in a template.
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "unique", "upper",
)  # fmt: skip
READS_ALL = {"dictsort", "e", "escape", "groupby", "max", "min", "sort", "string", "unique"}
COMPARES = ("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge",
            "<", "lt", "lessthan", "<=", "le", "in")  # fmt: skip
UNSAFE_STR = {
    "center", "encode", "expandtabs", "ljust", "maketrans", "rjust", "translate", "zfill",
}  # fmt: skip


class _Metering(NodeTransformer):
    """Adds to a parsed template the calls that count its work."""

    def body(self, node: Any) -> nodes.Node:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(text))))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_call("spend"), node.test)
        return node  # type: ignore[no-any-return]

    visit_For = visit_Macro = visit_CallBlock = visit_Block = body  # noqa: N815

    def literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _call("charge", node)

    visit_List = visit_Tuple = visit_Dict = literal  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("charge", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_call("read", part) for part in node.nodes]
        return _call("charge", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _call("read", node.expr)
        for operand in node.ops:
            operand.expr = _call("read", operand.expr)
        return node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Generation(Extension):
    """`{% generation %}`, with which transformers marks what the assistant wrote: its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates. May be used by several threads."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        self.meter = Meter()
        self.spend, self.charge, self.read = self.meter.spend, self.meter.charge, self.meter.read
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before the meter counts
            finalize=self.meter.read,
            extensions=[_Generation, loopcontrols],
        )
        self.filters = {name: self._metered(name, self.filters[name]) for name in FILTERS}
        own = {"replace": self.meter.replace, "indent": self.meter.indent}
        own |= {"join": self.join, "tojson": self.tojson}
        self.filters |= own
        for name in COMPARES:
            self.tests[name] = self._comparing(cast(Callable[..., Any], self.tests[name]))
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form[:100]),
        }

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text of a template from `compile_source`.

        Raises:
            Exception: whatever the template raises, or `TooMuchError`.
        """
        items, characters, _ = measure(variables)
        self.meter.start(items + characters)
        text = template.render(variables)
        self.meter.check(len(text))
        return text

    def compile_source(self, source: str) -> jinja2.Template:
        """Raises an Exception if `source` is no template."""
        if len(source) > MAX_SOURCE:
            raise TooMuchError(f"it has over {MAX_SOURCE} characters")
        self.meter.start(0)
        return self.from_string(source)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)  # type: ignore[return-value]

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        meter = self.meter

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, str) or name in READS_ALL:
                    meter.read(value)
            return meter.charge(function(*args, **kwargs))

        return run

    def _comparing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda left, right: function(self.meter.read(left), self.meter.read(right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """See jinja2; without the methods that make a large value from a number."""
        if isinstance(obj, (int, float)) or (isinstance(obj, str) and attr in UNSAFE_STR):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2; checks the size of the result first."""
        self.read(left)
        sizes = [sum(measure(v)[:2]) for v in (left, right)]
        if operator == "*" and isinstance(left, int | float) and isinstance(right, int | float):
            self.meter.check(sum(sizes))  # no more digits than both together
        elif operator == "*":
            for times, size in ((left, sizes[1]), (right, sizes[0])):
                if isinstance(times, int):
                    self.meter.check(size * min(times, self.meter.largest + 1))
        elif operator == "**":
            self.meter.check(abs(right) * sizes[0] * 1000)
        elif operator == "%" and isinstance(left, str):
            if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", left):
                raise TooMuchError("it formats with a width that may be large")
            self.meter.check(left.count("%") * sizes[1])
        return self.charge(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See jinja2; checks the size of the result first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            self.meter.format(value.__self__, *args, **kwargs)
            return wrapped(*args, **kwargs)

        return run

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See jinja2; counts the work."""
        if obj in (self.spend, self.charge, self.read):
            return obj(*args)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self.read(owner)
            self.read(args)
            if obj.__name__ == "replace":
                own = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
                return self.charge(self.meter.replace(owner, *args, **own))
            if obj.__name__ == "join":
                return self.charge(self.meter.join(args[0], owner))
        return self.charge(super().call(context, obj, *args, **kwargs))

    def join(self, values: Any, d: Any = "", attribute: str | int | None = None) -> str:
        """The filter `join`; with an attribute, of the values' attributes."""
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        return self.meter.join(values, d)

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """The filter `tojson` of transformers: no escapes for HTML.

        With `ensure_ascii`, private characters stay as they are: see `llama.text.chat_template`.
        """
        items, characters, depth = measure(self.read(value))
        width = indent if isinstance(indent, int) else len(indent or "")
        between = len(separators[0]) + len(separators[1]) if separators else 0
        self.meter.check(items * (width * depth + between + 8) + characters)
        text = json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if ensure_ascii:
            text = re.sub("[^\0-\x7f\ue000-\uf8ff]", lambda m: json.dumps(m[0])[1:-1], text)
        return str(self.charge(text))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
