"""Where a node that replaces several may stand."""

from __future__ import annotations

from torch import fx

from qgalore_compile.passes.nodes import VIEWS, arguments, is_anchor


def base(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target in VIEWS:
        node = arguments(node)[0]
    return node


def move_behind(call: fx.Node, results: list[fx.Node]) -> None:
    """Move what stands before a call and waits for it behind it: readers of its results, anchors that overwrite what it
    reads, and what waits for those."""
    waiting: set[fx.Node] = set()
    pending = [call, *results]
    while pending:
        node = pending.pop()
        overwriting = [user for source in node.all_input_nodes for user in base(source).users
                       if is_anchor(user) and user.args[0] is base(source)]  # fmt: skip
        late = [user for user in (*node.users, *overwriting) if user < call and user not in waiting]
        waiting.update(late)
        pending.extend(late)
    for node in sorted(waiting, reverse=True):
        results[-1].append(node)
