"""Searches for the permutation of a group by name. To add one: a function in a file, and its entry here.

`SEARCHES` (`model.search`) holds whole searches, of the type `search.GroupSearch`; the fact `children` says on how many
of a group's children they are scored (None: all), `reads` which settings of `model` they read that others do not,
`may_be_brief` that they take `thorough=False`, for networks that are calibrated afterwards.
`STEPS` (`permutation_specs.<layer>.optimization`) holds what a
search can be put together from, of the type `search.Step`.
"""

from __future__ import annotations

from typing import Any

from ...common.registry import Entry, Registry

SEARCHES: Registry[Any] = Registry(
    "search",
    {
        "best": Entry(
            ".compression.permute.search:search_best",
            "all children of a group, until nothing is gained",
            {"reads": ("search_seconds",), "may_be_brief": True},
        ),
        "published": Entry(
            ".compression.permute.search:search_published",
            "the paper's search, first child only",
            {"children": 1, "reads": ()},
        ),
    },
)

STEPS: Registry[Any] = Registry(
    "step of a search",
    {
        "GREEDY": Entry(".compression.permute.search:greedy", "greedy start"),
        "STOCHASTIC": Entry(".compression.permute.search:stochastic", "stochastic local search"),
        "RANDOM": Entry(".compression.permute.search:random", "the best of random permutations"),
    },
)
