"""The syntax tree of a chat template, with a count at the head of each loop and macro, and where it builds values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from jinja2 import Environment, nodes
from jinja2.visitor import NodeTransformer

Body = TypeVar("Body", nodes.For, nodes.Macro, nodes.CallBlock)


class Counted(NodeTransformer):
    """Puts the counts into a template's syntax tree; `template_sandbox.STEPS` are what they call."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - Jinja names its nodes so
        """Each item is a step, also one that the loop's test leaves out."""
        self._body(node)
        if node.test is not None:  # it runs for every item, the body only for those that it lets through
            node.test = nodes.And(self._step("tick", node, nodes.Const(0)), node.test).set_lineno(node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        """Each call is a step."""
        return self._body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:  # noqa: N802
        """Each call is a step."""
        return self._body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        """`~`, measured first."""
        self.generic_visit(node)
        return self._step("joined", node, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        """A slice, measured: each is a copy."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [node.arg.start, node.arg.stop, node.arg.step]
        return self._step("sliced", node, node.node, *(nodes.Const(None) if end is None else end for end in ends))

    def visit_List(self, node: Any) -> nodes.Expr:  # noqa: N802
        """A list, a tuple or a mapping that is built, weighed."""
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored or not node.items else self._step("built", node, node)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815 - Jinja's names of its nodes

    def _body(self, node: Body) -> Body:
        words = sum(len(data.data) for part in node.body for data in _words(part))
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._step("tick", node, nodes.Const(words)))
        node.body.insert(0, tick.set_lineno(node.lineno).set_environment(self._environment))
        return node

    def _step(self, name: str, at: nodes.Node, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
        step = nodes.Filter(value, f"ftcore {name}", list(args), [], None, None)
        return step.set_lineno(at.lineno).set_environment(self._environment)  # type: ignore[return-value]


def _words(part: nodes.Node) -> Iterator[nodes.TemplateData]:
    return iter([part]) if isinstance(part, nodes.TemplateData) else part.find_all(nodes.TemplateData)
