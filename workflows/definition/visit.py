"""One visit of a node: on its terms, with what it reads, to what it writes and where it leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentctx.workflows.call import MAX_RETRIES, Terms, on_terms
from agentctx.workflows.definition.schema import END, Match
from agentctx.workflows.definition.site import Result, Site
from agentctx.workflows.frame import Step
from agentctx.workflows.notes import stated
from agentctx.workflows.run import RunContext


def visit(site: Site, match: Match | None) -> Step:
    """One visit of a node: on its terms, with what it reads, to what it writes."""
    work = site.type.build(site)
    attempts = site.node.retry.attempts if site.node.retry else MAX_RETRIES + 1
    terms = Terms(attempts, site.node.timeout, site.node.cache)

    async def once(run: RunContext, state: Any) -> dict[str, Any]:
        values = {port.key: state[port.key] for port in site.ports if port.key in state}
        values["items"] = state.get("items", [])
        values["taken"] = state.get("taken", {}).get(site.name, [])
        with on_terms(terms):
            result = await work(run, values)
        update = _update(site, result)
        if site.node.max_visits:
            update["visits"] = {site.name: state.get("visits", {}).get(site.name, 0) + 1}
        if match:
            said = _said(run, site, result.value, match.path)
            cases = {_word(case): end for case, end in match.cases.items()}
            update["routes"] = {site.name: end_of(cases.get(said, match.default))}
        return update

    return once


def end_of(name: str) -> str:
    """The node that a way leads to; the end of a file is our last node."""
    return "finish" if name == END else name


def _update(site: Site, result: Result) -> dict[str, Any]:
    update: dict[str, Any] = {site.key: result.value}
    if site.kind == "answer":
        update["told"] = [site.name]
    if result.failures:
        update["failures"] = {f"{site.name}.{key}": failure for key, failure in result.failures.items()}
    for name in ("taken", "shown", "weighed"):
        if numbers := list(getattr(result, name)):
            update[name] = {site.name: numbers}
    if result.not_forwarded:
        update["lost"] = {site.name: result.not_forwarded}
    if result.inner is not None:
        update["inner"] = {site.name: dict(result.inner)}
    return update


def informs(run: RunContext, value: Mapping[str, Any]) -> bool:
    """True if an answer says anything."""
    data = run.cache.get(value["draft"]) or {}
    return not data.get("no_information", not (data.get("text") or stated(data)))


def _said(run: RunContext, site: Site, value: Any, path: str) -> str:
    """The field of what a node gave, as `match` compares it; "" if there is none."""
    if site.kind == "answer":
        data: Any = {"no_information": not informs(run, value), **(run.cache.get(value["draft"]) or {})}
    else:
        data = {"count": len(value), "no_information": not value}
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return _word(data)


def _word(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
