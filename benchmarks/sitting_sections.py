"""What a sitting found beside its headline figures, as Markdown: servers, starts, what sharing
blocks brings, idle shares, what steps cost.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sitting import OURS, PEER

Rows = Sequence[Mapping[str, Any]]

SERVED = (
    ("capacity", "req_s", "all at once, requests/s"),
    ("capacity", "out_tok_s", "all at once, out tok/s"),
    ("poisson", "req_s", "Poisson, requests/s"),
    *(
        ("poisson", f"{name}_{p}_ms", f"Poisson, {text}, {p}, ms")
        for name, text in (
            ("tpot", "time per output token"),
            ("ttft", "time to first token"),
            ("gap", "gap between tokens"),
        )
        for p in ("p50", "p90", "p99")
    ),
)
# What the PagedAttention paper promises of beams of six: blocks saved, and throughput.
SAVED_GOAL, RATIO_GOAL = 0.55, 2.2


def sections(rows: Rows) -> list[str]:
    """Those of which the sitting has rows, each under a heading."""
    made = (
        ("Servers under one client", served(rows)),
        ("From the process's start to the first token", starts(rows)),
        ("Sharing blocks, at equal memory", sharing(rows)),
        ("Idle share of the GPU under a full batch", idle(rows)),
        ("What a step costs", costs(rows)),
    )
    return [f"### {title}\n\n{text}" for title, text in made if text]


def markdown(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table; nothing where it has no lines."""
    if not lines:
        return ""
    rule = "|" + "---|" * len(columns)
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *body])


def spread(found: Sequence[float]) -> str:
    """The median; where there are several also the least, the most and how many."""
    if not found:
        return "–"
    middle = statistics.median(found)
    digits = 0 if middle >= 1000 else 1 if middle >= 100 else 2
    text = f"{middle:,.{digits}f}"
    if len(found) > 1:
        text += f" ({min(found):,.{digits}f}–{max(found):,.{digits}f}; {len(found)})"
    return text


def served(rows: Rows) -> str:
    """Both servers beside each other; the peer's rate for both."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    asked: dict[str, set[tuple[str | None, float | None]]] = defaultdict(set)
    for row in rows:
        if row.get("load") in ("capacity", "poisson") and row.get("value") is not None:
            found[row["load"], row["metric"]][row["engine"]].append(row["value"])
            asked[row["load"]].add((row.get("digest"), row.get("rate")))
    lines = []
    for load, metric, name in SERVED:
        ours, theirs = (found[load, metric][engine] for engine in (OURS, PEER))
        if ours or theirs:
            both = ours and theirs and len(asked[load]) == 1  # else the requests differ
            share = f"{statistics.median(ours) / statistics.median(theirs):.2f}" if both else "–"
            lines.append((name, spread(ours), spread(theirs), share))
    text = markdown(("load", OURS, PEER, "ratio"), lines)
    sent = sorted(rate for _, rate in asked["poisson"] if rate)
    return text + (f"\n\nPoisson arrivals a second: {', '.join(map(str, sent))}" if sent else "")


def starts(rows: Rows) -> str:
    """Every start of a server, with what each phase of it took."""
    lines = []
    for row in rows:
        if row["metric"] == "first_token_s" and row.get("value") is not None:
            phases = row.get("detail", {}).get("phases", {})
            log = phases.get("log") if "log" in phases else None
            said = "; ".join(log) if log else ", ".join(f"{k} {v:g}" for k, v in phases.items())
            lines.append((row.get("part", ""), row["engine"], f"{row['value']:.2f}", said))
    return markdown(("part", "engine", "s", "phases"), lines)


def details(rows: Rows, metric: str) -> list[Mapping[str, Any]]:
    """What the scripts of that name printed."""
    return [row["detail"] for row in rows if row["metric"] == metric and row.get("detail")]


def sharing(rows: Rows) -> str:
    """A ratio a kind and width, with the tokens a second of both sides."""
    sides = {
        (*_group(found), found["sharing"]): found["tok_s"] for found in details(rows, "sharing")
    }
    lines = []
    for found in details(rows, "sharing_ratio"):
        key = _group(found)
        saved, ratio = found["blocks_saved"], found["ratio"]
        verdict = ""
        if key[2:4] == ("beam", 6):
            good = saved >= SAVED_GOAL and ratio >= RATIO_GOAL
            verdict = "goal" if good else "**missed**"
        with_it, without = (_number(sides.get((*key, side))) for side in (True, False))
        lines.append(
            (*key[:4], f"{saved:.1%}", with_it, without, f"{ratio:.2f}", found["most"], verdict)
        )
    found_by = ("shape", "load", "kind", "width")
    columns = (*found_by, "blocks saved", "tok/s", "without", "ratio", "most", "")
    return markdown(columns, lines)


def _group(found: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(found[name] for name in ("shape", "load", "kind", "width", "blocks"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def idle(rows: Rows) -> str:
    """A line a window: the share without a kernel, and what the host did meanwhile."""
    lines = []
    for found in details(rows, "idle"):
        share = found.get("idle")
        verdict = "" if share is None else "bar" if share <= found["bar"] else "**missed**"
        shown = "–" if share is None else f"{share:.1%}"
        host = ", ".join(f"{name} {ms:.2f}" for name, ms in found.get("host_ms", {}).items())
        lines.append(
            (found["shape"], found["load"], found["after"], found["running"], found["step_ms"],
             found.get("profiled_step_ms", "–"), shown, verdict, host)
        )  # fmt: skip
    return markdown(
        ("shape", "load", "after", "running", "step, ms", "profiled", "idle", "≤ 3 %", "host, ms"),
        lines,
    )


def costs(rows: Rows) -> str:
    """Both engines' fits of a + b x sequences + c x KV tokens + e x prompt tokens."""
    numbers: tuple[tuple[str, Callable[[Mapping[str, Any]], object]], ...] = (
        ("a, ms", lambda f: f["a_ms"]),
        ("b, µs a sequence", lambda f: f["b_us"]),
        ("c, ns a KV token", lambda f: f["c_ns"]),
        ("e, µs a prompt token", lambda f: f["e_us"]),
        ("median error", lambda f: f"{f['median_error']:.1%}"),
        ("worst", lambda f: f"{f['worst_error']:.1%}"),
        ("points", lambda f: f["points"]),
    )
    lines = [
        (found["shape"], found["engine"], found["method"], *(get(found) for _, get in numbers))
        for found in details(rows, "cost_model")
    ]
    return markdown(("shape", "engine", "from", *(name for name, _ in numbers)), lines)
