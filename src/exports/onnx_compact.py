"""A graph in fewer bytes: short names for values that nobody asks for, and each constant once.

Tracing names every value by the path of its module, and writes the constant 1 hundreds of times. A network whose
weights are a megabyte would get a graph as large.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .onnx_trace import rename


def compact(graph: Any, kept: frozenset[str]) -> None:
    """Shorten a graph, in place; what it computes stays.

    Args:
        graph: without weights, or with them.
        kept: names that stay, besides those of inputs, outputs and initializers.
    """
    top = graph.graph
    constants = _constants_once(top)
    del top.value_info[:]
    graph.doc_string = ""
    stay = {one.name for one in (*top.input, *top.output, *top.initializer)} | kept | set(constants.values())
    short: dict[str, str] = {}
    for below in _graphs(top):
        del below.value_info[:]
        below.doc_string = ""
        for node in below.node:
            node.name = node.doc_string = ""
            for name in node.output:
                if name and name not in stay:
                    short.setdefault(name, f"v{len(short)}")
        if below is not top:
            for one in (*below.input, *below.output, *below.initializer):
                if one.name not in stay:
                    short.setdefault(one.name, f"v{len(short)}")
    rename(top, short)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for below in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(below)


def _constants_once(graph: Any) -> dict[str, str]:
    """Turn nodes that are constants into initializers, equal ones into one; the names that they had -> what they have
    now. What is an output of the graph stays."""
    outputs = {one.name for one in graph.output}
    by_value: dict[bytes, list[Any]] = defaultdict(list)
    others = []
    for node in graph.node:
        value = node.attribute[0] if node.op_type == "Constant" and len(node.attribute) == 1 else None
        if value is None or value.name != "value" or node.output[0] in outputs:
            others.append(node)
            continue
        value.t.name = ""
        by_value[value.t.SerializeToString(deterministic=True)].append(node)
    names: dict[str, str] = {}
    for number, nodes in enumerate(by_value.values()):
        tensor = graph.initializer.add()
        tensor.CopyFrom(nodes[0].attribute[0].t)
        tensor.name = f"c{number}"
        names |= {node.output[0]: tensor.name for node in nodes}
    del graph.node[:]
    graph.node.extend(others)
    rename(graph, names)
    return names
