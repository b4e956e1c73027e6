from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import ping_pong, sequential, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.runtime.batch_layout import place_rows
from nanoflow_tune.runtime.batch_memory import BatchSizes, attention_ranges
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.page_tables import PageTables
from nanoflow_tune.runtime.static_batch import StaticBatch
from nanoflow_tune.runtime.step import NOT_YET_KNOWN, Chunk, StepInputs

GRAPH = OpGraph.build(tiny_model())
ROWS, SLOTS, PAGES, PAGE = 24, 16, 8, 16
SIZES = BatchSizes(num_logits=24, max_chunks=6, max_pages=PAGES, num_slots=SLOTS, page_size=PAGE)
SCHEDULES = {
    "sequential": sequential(GRAPH, ROWS, 10),
    "decodes first": ping_pong(GRAPH, 12, ROWS, (10, 0)),
    "interleaved": ping_pong(GRAPH, 8, ROWS, (4, 8)),
}


def step_of(decodes, chunks):
    """Decodes are (slot, position, token), chunks (slot, first position, tokens, is complete)."""
    columns = np.array(decodes, dtype=np.int64).reshape(-1, 3)
    return StepInputs(
        choice="",
        decode_slots_R=columns[:, 0].astype(np.int32),
        decode_positions_R=columns[:, 1].astype(np.int32),
        decode_tokens_R=columns[:, 2],
        chunks=tuple(
            Chunk(slot=slot, first_position=first, token_ids=tuple(tokens), is_complete=complete)
            for slot, first, tokens, complete in chunks
        ),
        page_updates_U3=np.empty((0, 3), dtype=np.int32),
    )


@st.composite
def steps(draw):
    num_decodes = draw(st.integers(0, 10))
    room = ROWS - num_decodes
    chunks, slot = [], num_decodes
    while room and slot < SLOTS and len(chunks) < 6 and draw(st.booleans()):
        count = draw(st.integers(1, room))
        first = draw(st.integers(0, PAGES * PAGE - count))
        chunks.append(
            (slot, first, [100 + 10 * slot + i % 9 for i in range(count)], draw(st.booleans()))
        )
        room, slot = room - count, slot + 1
    decodes = [
        (index, draw(st.integers(0, PAGES * PAGE - 1)), draw(st.sampled_from([NOT_YET_KNOWN, 7])))
        for index in range(num_decodes)
    ]
    return decodes, chunks


def page_table():
    return (np.arange(SLOTS * PAGES, dtype=np.int32) + 1).reshape(SLOTS, PAGES)


def page_tables():
    tables = PageTables(SLOTS, PAGES, torch.device("cpu"), is_shared=False)
    places = np.indices((SLOTS, PAGES)).reshape(2, -1)
    tables.update(np.stack((*places, page_table().reshape(-1)), axis=1).astype(np.int32))
    return tables


def cell(slot, position):
    return int(page_table()[slot, position // PAGE]) * PAGE + position % PAGE


@given(steps(), st.sampled_from(sorted(SCHEDULES)), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_place_and_the_rest_is_padding(step, name, is_captured):
    decodes, chunks = step
    schedule = SCHEDULES[name]
    last_tokens = torch.arange(SLOTS + 1) + 1000
    batch = StaticBatch.make(schedule, SIZES, last_tokens, is_captured=is_captured)
    filler = [(s, 5, 9) for s in range(10)], [(10, 0, [3] * 14, True)]
    batch.fill(step_of(*filler), page_tables())  # something that must be gone after
    batch.fill(step_of(decodes, chunks), page_tables())
    batch.fetch_token_ids()
    wanted = {cell(s, p): (p, t if t != NOT_YET_KNOWN else 1000 + s) for s, p, t in decodes}
    for slot, first, tokens, _ in chunks:
        wanted |= {cell(slot, first + i): (first + i, token) for i, token in enumerate(tokens)}
    rows = {}
    for row, slot_of_row in enumerate(batch.slots_T.tolist()):
        if slot_of_row == 0:
            assert (int(batch.positions_T[row]), int(batch.token_ids_T[row])) == (0, 0)
        else:
            rows[slot_of_row] = row
            expected = int(batch.positions_T[row]), int(batch.token_ids_T[row])
            assert wanted[slot_of_row] == expected
    assert rows.keys() == wanted.keys()
    _check_attention(batch, schedule, rows, decodes, chunks, is_captured)
    ends = [(s, p) for s, p, _ in decodes]
    ends += [(s, first + len(tokens) - 1) for s, first, tokens, done in chunks if done]
    logits = [(int(r), int(s)) for r, s in zip(batch.logit_rows_R, batch.logit_slots, strict=True)]
    assert logits[: len(ends)] == [(rows[cell(s, p)], s) for s, p in ends]
    assert set(logits[len(ends) :]) <= {(0, SLOTS)}


def _check_attention(batch, schedule, rows, decodes, chunks, is_captured):
    seen_decodes, seen_rows = [], []
    for op, tokens in attention_ranges(schedule):
        if op == "decode_attention":
            found = batch.decode_rows(tokens)
            if found is None:
                continue
            for row, kv_len, pages in zip(
                found.row_ids_R.tolist(),
                found.kv_lens_R.tolist(),
                found.page_table_RP.tolist(),
                strict=True,
            ):
                if kv_len == 0:
                    assert is_captured
                    continue
                assert tokens[0] <= row < tokens[1]
                assert kv_len <= found.max_kv_len
                (owner,) = [s for s, p, _ in decodes if rows[cell(s, p)] == row]
                count = -(-kv_len // PAGE)
                assert pages[:count] == page_table()[owner, :count].tolist()
                seen_decodes.append((owner, kv_len - 1))
        else:
            found = batch.prefill_rows(tokens)
            if found is None:
                continue
            assert sum(found.segment_rows) >= int(found.num_rows_S.sum())
            for first, count, position, pages in zip(
                found.row_starts_S.tolist(),
                found.num_rows_S.tolist(),
                found.position_starts_S.tolist(),
                found.page_table_SP.tolist(),
                strict=True,
            ):
                if count == 0:
                    assert is_captured
                    continue
                assert tokens[0] <= first < first + count <= tokens[1]
                for i in range(count):
                    page = pages[(position + i) // PAGE]
                    seen_rows.append(page * PAGE + (position + i) % PAGE)
                    assert rows[seen_rows[-1]] == first + i
    assert sorted(seen_decodes) == sorted((s, p) for s, p, _ in decodes)
    expected = [cell(s, f + i) for s, f, tokens, _ in chunks for i in range(len(tokens))]
    assert sorted(seen_rows) == sorted(expected)


def test_tensors_stay_where_they_are():
    batch = StaticBatch.make(
        SCHEDULES["sequential"], SIZES, torch.zeros(SLOTS + 1, dtype=torch.int64), is_captured=True
    )
    before = batch.decode_rows((0, ROWS)).kv_lens_R.data_ptr(), batch.slots_T.data_ptr()
    batch.fill(step_of([(0, 3, 1)], []), page_tables())
    assert before == (
        batch.decode_rows((0, ROWS)).kv_lens_R.data_ptr(),
        batch.slots_T.data_ptr(),
    )


def test_a_step_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit 24 rows"):
        place_rows(SCHEDULES["sequential"], 20, 5)


def test_batches_with_fewer_logit_rows_are_views_of_the_same_memory():
    wide = StaticBatch.make(SCHEDULES["sequential"], SIZES, torch.arange(17), is_captured=True)
    narrow = wide.narrowed(4)
    narrow.fill(step_of([(3, 5, 9), (8, 2, 9)], []), page_tables())
    assert narrow.logit_slots.tolist() == [3, 8, SLOTS, SLOTS]
    assert narrow.logit_rows_R.tolist() == [0, 1, 0, 0]
    assert wide.logit_slots.tolist() == [3, 8, *[SLOTS] * 22]
    assert narrow.positions_T is wide.positions_T
    with pytest.raises(ValueError, match="choose one with more logit rows"):
        narrow.fill(step_of([(slot, 5, 9) for slot in range(5)], []), page_tables())
