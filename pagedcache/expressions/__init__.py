# SPDX-License-Identifier: Apache-2.0
"""The language in which users say what happens to a row.

An expression is text. It is data, not code: `parse` reads it with Python's own grammar (`ast`) and
refuses what is not in the language, so nothing of it is ever run by Python. What is left is one
tree of typed operations, which each backend evaluates in its own way.
"""

from __future__ import annotations

from pagedcache.expressions.parse import Expression, ExpressionError, parse
from pagedcache.expressions.tree import Kind, Node, Parameter

__all__ = ["Expression", "ExpressionError", "Kind", "Node", "Parameter", "parse"]
