"""What a sitting's rows say, as Markdown: engines beside each other, ratios, bars and goals."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sitting import OURS, PEER
from sitting_sections import Rows, markdown, sections, spread

STATIC = "transformers"
SERVER_LOADS = ("capacity", "poisson", "cold-start")


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure with a bar and a goal: as a ratio to `peer`, or in its own unit without one."""

    name: str
    shape: str
    load: str
    metric: str
    bar: float
    goal: float
    peer: str | None = PEER
    higher: bool = True

    def met(self, value: float, limit: float) -> bool:
        """Whether `value` is at least as good as `limit`."""
        return value >= limit if self.higher else value <= limit


CLAIMS = (
    Claim("llama-8b sharegpt, out tok/s", "llama-8b", "sharegpt", "out_tok_s", 1.0, 1.3),
    Claim("llama-8b single stream, out tok/s", "llama-8b", "single", "out_tok_s", 1.1, 1.3),
    Claim("llama-8b prefill, in tok/s", "llama-8b", "prefill", "in_tok_s", 0.95, 1.1),
    Claim("qwen3-0.6b uniform, out tok/s", "qwen3-0.6b", "uniform", "out_tok_s", 1.0, 1.4),
    Claim("qwen3-0.6b single stream, out tok/s", "qwen3-0.6b", "single", "out_tok_s", 2.0, 4.0),
    Claim(
        "llama-8b process start to first token, s", "llama-8b", "cold-start", "first_token_s",
        12.0, 6.0, peer=None, higher=False,
    ),
    Claim(
        "llama-8b served at 70 %, p99 time per output token, ms", "llama-8b", "poisson",
        "tpot_p99_ms", 1.0, 0.85, higher=False,
    ),
    Claim(
        "llama-8b sharegpt against `generate`, out tok/s", "llama-8b", "sharegpt", "out_tok_s",
        24.0, 24.0, peer=STATIC,
    ),
)  # fmt: skip


def tables(rows: Rows) -> str:
    """The tables of each sitting that the file holds."""
    ordered = sorted(rows, key=lambda row: str(row["sitting"]))
    return "\n\n".join(
        f"## {name}\n\n{table(list(found))}"
        for name, found in itertools.groupby(ordered, lambda row: row["sitting"])
    )


def table(rows: Rows) -> str:
    """All tables of the rows, which are of one sitting."""
    parts = [_machine(rows), _claims(rows), *sections(rows), _engines(rows), _static(rows)]
    parts += [_others(rows), _failures(rows)]
    return "\n\n".join(part for part in parts if part)


def values(rows: Rows, engine: str, claim: Claim) -> list[float]:
    """What an engine reached, repetition by repetition; of static batches the best alone counts."""
    found = [
        float(row["value"])
        for row in rows
        if row.get("engine") == engine
        and (row.get("shape"), row.get("load"), row["metric"])
        == (claim.shape, claim.load, claim.metric)
        and row.get("value") is not None
    ]
    return [max(found)] if engine == STATIC and found else found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Of the medians, and the least and the most that any two repetitions give."""
    middle = statistics.median(ours) / statistics.median(theirs)
    return middle, min(ours) / max(theirs), max(ours) / min(theirs)


def share_of_limit(rows: Rows, engine: str, claim: Claim) -> str:
    """How much of what the machine allows an engine reached, where that is known."""
    shares = [
        row["value"] / row["limit"]
        for row in rows
        if row.get("engine") == engine
        and (row.get("shape"), row.get("load"), row["metric"])
        == (claim.shape, claim.load, claim.metric)
        and row.get("value") is not None
        and row.get("limit")
    ]
    return f", {statistics.median(shares):.0%}" if shares and engine != STATIC else ""


def _machine(rows: Rows) -> str:
    """Whose figures these are, and of which state of the repository."""
    found = next((row["detail"] for row in rows if row["metric"] == "ceilings"), None)
    if found is None:
        return ""
    of_what = sorted({str(row["commit"]) for row in rows if row.get("commit")})
    versions = sorted({f"{r['engine']} {r['version']}" for r in rows if r.get("version")})
    return (
        f"{found['device']}: copies {found['copy_TB_s']} TB/s, multiplies bf16 at "
        f"{found['bf16_TFLOP_s']} TFLOP/s. torch {found['torch']}, {', '.join(versions)}; commit "
        f"{', '.join(of_what)}."
    )


def _claims(rows: Rows) -> str:
    lines = []
    for claim in CLAIMS:
        ours = values(rows, OURS, claim)
        theirs = values(rows, claim.peer or PEER, claim)
        if not ours:
            continue
        verdict, shown = "–", "–"
        if theirs and (claim.peer == STATIC or _same_requests(rows, claim)):
            middle, least, most = ratio(ours, theirs)
            shown = f"{middle:.2f} ({least:.2f}–{most:.2f})"
            judged = statistics.median(ours) if claim.peer is None else middle
            verdict = _verdict(claim, judged)
        elif theirs:
            verdict = "not comparable: the requests differ"
        elif claim.peer is None:
            verdict = _verdict(claim, statistics.median(ours))
        sign = "≥" if claim.higher else "≤"
        both = (
            spread(each) + share_of_limit(rows, engine, claim)
            for each, engine in ((ours, OURS), (theirs, claim.peer or PEER))
        )
        bars = (f"{sign} {claim.bar:g}", f"{sign} {claim.goal:g}")
        lines.append((claim.name, *both, shown, *bars, verdict))
    of_ours = "octavo: median (least–most; passes), of the limit"
    columns = ("workload", of_ours, "peer", "ratio (least–most)", "first bar", "goal", "met")
    return markdown(columns, lines)


def _verdict(claim: Claim, value: float) -> str:
    if claim.met(value, claim.goal):
        return "goal"
    return "bar" if claim.met(value, claim.bar) else "**missed**"


def _same_requests(rows: Rows, claim: Claim) -> bool:
    """Whether all engines had the same requests at the same rate."""
    kinds = {
        (row.get("digest"), row.get("rate"))
        for row in rows
        if (row.get("shape"), row.get("load"), row["metric"])
        == (claim.shape, claim.load, claim.metric)
        and row.get("engine") in (OURS, PEER)
    }
    return len(kinds) == 1


def _engines(rows: Rows) -> str:
    """Every value that was measured without a server, beside the machine's limit."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    limits: dict[tuple[str, str, str], float] = {}
    for row in rows:
        elsewhere = row.get("load") in (None, *SERVER_LOADS) or row.get("engine") in (None, STATIC)
        if not elsewhere and row.get("value") is not None:
            key = (row["shape"], row["load"], row["metric"])
            found[key][row["engine"]].append(row["value"])
            if row.get("limit"):
                limits[key] = row["limit"]
    lines = []
    for key, engines in sorted(found.items()):
        for engine, each in engines.items():
            share = f"{statistics.median(each) / limits[key]:.0%}" if key in limits else "–"
            limit = f"{limits[key]:,.0f}" if key in limits else "–"
            lines.append((*key, engine, spread(each), limit, share))
    middle = "median (least–most; passes)"
    return markdown(("shape", "load", "metric", "engine", middle, "limit", "share"), lines)


def _static(rows: Rows) -> str:
    """transformers' `generate`, batch by batch."""
    lines = []
    for row in rows:
        if row.get("engine") == STATIC and row.get("load") == "sharegpt":
            shown = row.get("why") if row.get("value") is None else f"{row['value']:,.1f}"
            took = f"{row.get('measured_s', 0):.1f}"
            lines.append((row["batch"], shown, took, row.get("steps", "–")))
    return markdown(("`generate`, batch", "out tok/s", "of that measured, s", "steps"), lines)


def _others(rows: Rows) -> str:
    """A line each."""
    named = {"start", "weights_s", "part"}
    lines = []
    for row in rows:
        if row["metric"] in named or row.get("part_of"):
            detail = {k: v for k, v in row.get("detail", {}).items() if k not in ("metric",)}
            who = " ".join(str(row[k]) for k in ("part", "engine", "shape") if row.get(k))
            lines.append(f"- {row['metric']} {who}: {row.get('value')} {detail or ''}"[:400])
    return "\n".join(lines)


def _failures(rows: Rows) -> str:
    """What failed, and what was skipped and not made up for."""
    ended = {row["part"] for row in rows if row["metric"] == "part"}
    return "\n".join(
        f"- **{row['metric']}** {row['part']}: {' '.join(str(row.get('why')).split())[-300:]}"
        for row in rows
        if row["metric"] == "failed" or (row["metric"] == "skipped" and row["part"] not in ended)
    )
