"""What is wrong with a profile before a search believes it: contradictions, gaps, odd curves.

refused   two rows of one point that differ more than `MAX_RATIO` times; no rows of any GEMM
warned    an op of the graph without rows of its kind (the datasheet stands in), a kind that was
          measured on one SM share only (others are scaled by the datasheet), a kernel whose
          throughput falls by more than `MAX_FALL` where it gets more SMs; all-gathers that were
          made from all-reduces (`gather_rows.py`)
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from ..profiler.contradictions import (
    ContradictoryProfileError,
    refuse_contradictions,
    row_name,
)
from ..profiler.profile import Profile, Row
from ..runtime.op_graph import GEMM_KINDS, OpGraph

MAX_FALL = 0.3
MOST_NAMED = 3
"""Rows that a warning names."""


def profile_warnings(profile: Profile, graph: OpGraph) -> list[str]:
    """What a reader should know about the times that a search will use.

    Args:
        profile: as loaded.
        graph: of the model that is searched.

    Raises:
        ContradictoryProfileError: with the rows, the rule and the remedy.
    """
    rows = [row for row in profile.usable_rows if row.source == "measured"]
    refuse_contradictions(rows)
    kinds = {row.point.kind for row in profile.usable_rows}
    if not kinds.intersection(GEMM_KINDS):
        raise ContradictoryProfileError(
            "a profile must hold rows of GEMMs, but this one has rows of "
            f"{', '.join(sorted(kinds)) or 'nothing'}; profile the model, or search on "
            "--profile roofline"
        )
    found = [*_missing(kinds, graph), *_single_shares(rows, graph), *_falling(rows)]
    is_measured = any(row.point.kind == "all_gather" for row in rows)
    if graph.alternatives and "all_gather" in kinds and not is_measured:
        found.append(
            "profile has no all-gathers: their times are those of all-reduces that send as many "
            "bytes"
        )
    return found


def _missing(kinds: set[str], graph: OpGraph) -> list[str]:
    ops = [op.name for op in graph.layer if op.kind not in kinds]
    if not ops:
        return []
    return [f"profile has no rows for {', '.join(ops)}: their times come from the datasheet"]


def _single_shares(rows: list[Row], graph: OpGraph) -> list[str]:
    shares = defaultdict[str, set[int]](set)
    for row in rows:
        if row.point.num_sms:
            shares[row.point.kind].add(row.point.num_sms)
    wanted = {op.kind for op in graph.layer}
    return [
        f"profile has {kind} on {min(found)} SMs only: its times on other shares are scaled by the "
        "datasheet, and an overlap with it is a guess"
        for kind, found in sorted(shares.items())
        if kind in wanted and len(found) == 1
    ]


def _falling(rows: list[Row]) -> list[str]:
    curves = defaultdict[object, list[Row]](list)
    for row in rows:
        point = row.point
        if point.num_sms:
            key = point.kind, point.shape, point.variant, point.tokens, point.kv_len
            curves[key].append(row)
    odd: list[str] = []
    for curve in curves.values():
        for few, many in pairwise(sorted(curve, key=lambda row: row.point.num_sms)):
            is_more = few.point.num_sms < many.point.num_sms
            if is_more and few.median_us < (1 - MAX_FALL) * many.median_us:
                odd.append(
                    f"{row_name(many)} against {few.median_us:g} us on {few.point.num_sms} SMs"
                )
    if not odd:
        return []
    return [
        f"throughput falls by more than {MAX_FALL:.0%} with more SMs in {len(odd)} row(s) of the "
        f"profile, which are used as they were measured; e.g. {'; '.join(odd[:MOST_NAMED])}"
    ]
